"""What is run at which size: the presets of `thudi2021.py`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lightning_unlearn.functional.standard_deviation_penalty import convert_gamma

__all__ = ["PRESETS", "Job", "Preset", "Task", "jobs_of"]


@dataclass(frozen=True)
class Task:
    """A data set, a network, and how the network is pretrained and then fine-tuned.

    Attributes:
        name: Of the task in tables and jobs.
        dataset: `"cifar10"` or `"imdb"`.
        network: Name in `thudi2021_models.build`.
        pretrain: Samples, epochs, batch size, optimizer and learning rate of the pretraining.
        tune_samples: Samples of the fine-tuning, others than those of the pretraining.
        test_samples: Held-out samples.
        batch_size: Of the fine-tuning; one such batch is forgotten.
        learning_rates: Of plain SGD in the grid; every one is trained once, for `epochs`.
        epochs: Length of the fine-tuning; the model is looked at after each of them.
        gammas: Strengths of the SD penalty, in the paper's form; 0 is run as well. Each is run twice: in the
            fine-tuning only, and from the pretraining on.
        penalty_rate: Learning rate at which the penalties are run.
        curvature_samples: Fixed training samples on which the Hessian is taken.
        curvature_every: Steps between two measurements of its top singular value.
        shards: Numbers of shards of SISA; none: no table of costs.
        cost_rate: Learning rate of the table of costs.
        classes: Number of classes.
        vocabulary: Words of a text network, by frequency in the pretraining texts.
        length: Tokens of a text that are read.
    """

    name: str
    dataset: Literal["cifar10", "imdb"]
    network: str
    pretrain: tuple[int, int, int, Literal["sgd", "adam"], float]
    tune_samples: int
    test_samples: int
    batch_size: int
    learning_rates: tuple[float, ...]
    epochs: int
    gammas: tuple[float, ...]
    penalty_rate: float
    curvature_samples: int
    curvature_every: int
    shards: tuple[int, ...] = ()
    cost_rate: float = 0.01
    classes: int = 10
    vocabulary: int = 0
    length: int = 0


@dataclass(frozen=True)
class Preset:
    """Tasks and how often they are repeated.

    Attributes:
        tasks: What is fine-tuned.
        seeds: Repetitions; a seed draws the samples, their order, the start and which batch is forgotten.
        toy_seeds: Repetitions of the softmax regression.
        accelerator: As `Trainer` takes it.
    """

    tasks: tuple[Task, ...]
    seeds: int
    toy_seeds: int
    accelerator: str = "cpu"

    def task(self, name: str) -> Task:
        """The task of that name."""
        return next(task for task in self.tasks if task.name == name)


@dataclass(frozen=True)
class Job:
    """One unit of work, the smallest thing that an interrupted study does again.

    Attributes:
        kind: What is done.
        seed: Of everything that is drawn.
        task: Name of the task; none for the softmax regression.
        lr: Learning rate of the fine-tuning.
        gamma: Penalty of the fine-tuning.
        start: Penalty of the pretraining.
    """

    kind: Literal["toy", "pretrain", "tune", "cost"]
    seed: int
    task: str = ""
    lr: float = 0.0
    gamma: float = 0.0
    start: float = 0.0

    @property
    def key(self) -> str:
        """Its name in the JSON."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


def jobs_of(preset: Preset) -> tuple[list[Job], list[Job]]:
    """The work that waits for nothing, and the work that waits for the pretrained weights; long jobs first."""
    first = [
        Job("pretrain", seed, task.name, start=gamma)
        for task in preset.tasks
        for seed in range(preset.seeds)
        for gamma in (0.0, *task.gammas)
    ]
    first += [Job("toy", seed) for seed in range(preset.toy_seeds)]
    then: list[Job] = []
    for task in preset.tasks:
        settings = [(lr, 0.0, 0.0) for lr in task.learning_rates]
        settings += [(task.penalty_rate, gamma, start) for gamma in (0.0, *task.gammas) for start in (0.0, gamma)]
        for seed in range(preset.seeds):
            if task.shards:
                then.append(Job("cost", seed, task.name, task.cost_rate))
            then += [Job("tune", seed, task.name, *one) for one in dict.fromkeys(settings)]
    return first, then


_CODE_GRID = (0.1, 1, 5, 10, 15, 20, 25, 50, 100, 150, 200, 250)
"""`std_reg` of the official image runs; as gamma of the paper's form, for ten classes, about a tenth of that."""

_CIFAR_CPU = Task(
    name="CIFAR-10",
    dataset="cifar10",
    network="small-resnet",
    pretrain=(10_000, 8, 128, "adam", 2e-3),
    tune_samples=1_920,
    test_samples=2_000,
    batch_size=32,
    learning_rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    epochs=5,
    gammas=(0.1, 0.5, 1.0, 2.0),
    penalty_rate=0.01,
    curvature_samples=64,
    curvature_every=30,
    shards=(2, 5, 10),
)
_BATCH_NORM_CPU = replace(
    _CIFAR_CPU,
    name="CIFAR-10, BatchNorm",
    network="small-resnet-bn",
    learning_rates=(0.001, 0.01, 0.1),
    gammas=(),
    shards=(),
)
_IMDB_CPU = Task(
    name="IMDB",
    dataset="imdb",
    network="mean-pooling",
    pretrain=(10_000, 3, 128, "adam", 2e-3),
    tune_samples=1_920,
    test_samples=2_000,
    batch_size=32,
    learning_rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    epochs=5,
    gammas=(0.1, 0.5, 1.0),
    penalty_rate=0.1,
    curvature_samples=64,
    curvature_every=30,
    cost_rate=0.1,
    classes=2,
    vocabulary=5_000,
    length=200,
)


def _paper(network: str) -> Task:
    return Task(
        name=f"CIFAR-10, {network}",
        dataset="cifar10",
        network=network,
        pretrain=(25_000, 20, 128, "sgd", 0.01),
        tune_samples=24_992,
        test_samples=10_000,
        batch_size=32,
        learning_rates=(0.001, 0.003, 0.01, 0.03, 0.1),
        epochs=5,
        gammas=tuple(round(convert_gamma(code, 10, source="code", target="paper"), 4) for code in _CODE_GRID),
        penalty_rate=0.01,
        curvature_samples=512,
        curvature_every=200,
        shards=(5, 10, 20),
    )


def _smoke(task: Task, **changes: Any) -> Task:
    small = {
        "pretrain": (96, 1, 32, "adam", 2e-3), "tune_samples": 64, "test_samples": 32, "batch_size": 16, "epochs": 2,
        "learning_rates": (task.cost_rate, 3 * task.cost_rate), "gammas": task.gammas[:1],
        "penalty_rate": task.cost_rate, "curvature_samples": 8, "curvature_every": 4,
    }  # fmt: skip
    return replace(task, **small, **changes)


PRESETS = {
    "smoke": Preset((_smoke(_CIFAR_CPU, shards=(2,)), _smoke(_IMDB_CPU, vocabulary=50, length=20)), 1, 2),
    "cpu": Preset((_CIFAR_CPU, _BATCH_NORM_CPU, _IMDB_CPU), seeds=3, toy_seeds=10),
    "paper": Preset(
        (_paper("resnet-18"), _paper("vgg-19"), replace(_IMDB_CPU, tune_samples=12_480)),
        seeds=3,
        toy_seeds=10,
        accelerator="auto",
    ),
}
