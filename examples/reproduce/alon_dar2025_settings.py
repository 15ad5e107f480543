"""What is run at which size: the presets of `alon_dar2025.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from images import ImageName

__all__ = ["GOALS", "METHODS", "PRESETS", "Goal", "Job", "Preset", "Task", "jobs_of"]

Goal = Literal["privacy", "bias_removal"]

GOALS: dict[Goal, str] = {"privacy": "privacy", "bias_removal": "bias removal"}
"""Goals with their names in tables and figures."""
METHODS = ("SCRUB", "NegGrad+", "L1-sparse")


@dataclass(frozen=True)
class Task:
    """A data set, a family of networks, and how they are trained.

    Attributes:
        dataset: Images.
        family: Name in `alon_dar2025_models.build`.
        widths: Channels of the first stage, k; the others have multiples of it.
        train: Training images.
        validation: Images to tune on, others than those; the original training set has enough.
        test: Held-out images, for the results alone.
        seeds: Repetitions; a seed draws the images, the forgotten ones, the wrong labels, weights and order.
        epochs: Of every training.
        batch_size: Of every training and pass.
        lr: Largest learning rate of the one-cycle schedule, and the base that methods scale.
        forgotten: Images to forget, drawn from the training images.
    """

    dataset: ImageName
    family: Literal["small-cnn", "resnet-18"]
    widths: tuple[int, ...]
    train: int
    validation: int
    test: int
    seeds: int
    epochs: int
    batch_size: int = 64
    lr: float = 0.05
    forgotten: int = 200

    @property
    def name(self) -> str:
        """In jobs, headings and names of files."""
        return self.dataset if self.family == "small-cnn" else f"{self.dataset}, {self.family}"


@dataclass(frozen=True)
class Preset:
    """Tasks, and how much is looked at.

    Attributes:
        tasks: What is trained.
        trials: Settings tried for every width, seed, method and goal; the first one is the method's defaults.
        lambdas: Weights of the goal; each chooses among the same trials.
        anchors: Forgotten images, and as many held-out ones, around which decision regions are compared.
        resolution: Points along each axis of such a plane, before it is cut to a disc.
        pictured: Points along each axis of a picture.
        shown_lambda: The one of the lambdas that pictures and the figure of decision regions show.
        check_every: Steps between two looks of NegGrad+ at whether it should stop.
        accelerator: As `Trainer` takes it.
    """

    tasks: tuple[Task, ...]
    trials: int
    lambdas: tuple[float, ...] = (0.2, 0.4, 0.6)
    anchors: int = 60
    resolution: int = 9
    pictured: int = 50
    shown_lambda: float = 0.4
    check_every: int = 5
    accelerator: str = "cpu"

    def task(self, name: str) -> Task:
        """The task of that name."""
        return next(task for task in self.tasks if task.name == name)


@dataclass(frozen=True)
class Job:
    """Everything of one width and one seed: three trainings, and the tuning of every method for every goal.

    Attributes:
        task: Name of the task.
        width: k.
        seed: Of everything that is drawn.
    """

    task: str
    width: int
    seed: int

    @property
    def key(self) -> str:
        """Its name in the JSON."""
        return f"task={self.task} width={self.width} seed={self.seed}"


def jobs_of(preset: Preset) -> list[Job]:
    """All the work, none of which waits for other; long jobs first."""
    jobs = [Job(task.name, width, seed) for task in preset.tasks for width in task.widths for seed in range(task.seeds)]
    return sorted(jobs, key=lambda job: -job.width)


_CIFAR_CPU = Task("CIFAR-10", "small-cnn", (2, 4, 8, 16, 32), 2_000, 1_000, 2_000, seeds=3, epochs=30)


def _smoke(task: Task, **changes: Any) -> Task:
    small = {"widths": (1, 2), "train": 48, "validation": 24, "test": 24, "seeds": 1, "epochs": 1, "forgotten": 8}
    return replace(task, batch_size=8, **{**small, **changes})


def _paper(dataset: ImageName) -> Task:
    return Task(dataset, "resnet-18", (1, 2, 4, 8, 16, 32, 64), 45_000, 5_000, 10_000, 3, 100, 128, lr=0.1)


PRESETS = {
    "smoke": Preset(
        (_smoke(_CIFAR_CPU), _smoke(replace(_CIFAR_CPU, dataset="Fashion-MNIST", family="resnet-18"), widths=(1,))),
        trials=2, lambdas=(0.2, 0.6), anchors=2, resolution=5, pictured=6, shown_lambda=0.6,
    ),
    "cpu": Preset((_CIFAR_CPU, replace(_CIFAR_CPU, dataset="Fashion-MNIST")), trials=10),
    "paper": Preset(
        (_paper("CIFAR-10"), _paper("Fashion-MNIST")),
        trials=20, anchors=200, resolution=15, pictured=200, accelerator="auto",
    ),
}  # fmt: skip
