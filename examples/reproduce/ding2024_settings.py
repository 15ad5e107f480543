"""What is run at which size: the presets of `ding2024.py`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from images import ImageName

__all__ = ["PRESETS", "Job", "Linear", "Preset", "Task", "jobs_of"]


@dataclass(frozen=True)
class Linear:
    """The linear model.

    Attributes:
        features: d, divided between both kinds of data.
        samples: Samples to keep, and as many to forget.
        shares: Shares of the features that are shared, each leaving an even number of others.
        share: The one at which other things are varied.
        tuned: Numbers of fine-tuning samples.
        tuned_part: The one at which other things are varied: some of the samples to keep, not all.
        keeps: Shares of the coefficients that masks made of importances keep.
        seeds: Repetitions; a seed draws data and true coefficients.
    """

    features: int
    samples: int
    shares: tuple[float, ...]
    share: float
    tuned: tuple[int, ...]
    tuned_part: int
    keeps: tuple[float, ...]
    seeds: int


@dataclass(frozen=True)
class Task:
    """A data set, a network and its training.

    Attributes:
        dataset: Name in `images.py`; also that of the task.
        network: `"small"`, that of `compare_data.py`, or `"resnet-18"`.
        train: Training images of all classes.
        val: Validation images: what a stopping rule may look at.
        test: Test images of all classes.
        epochs: Length of the training and of the retraining.
        lr: Learning rate of SGD with momentum, a cosine over the training.
        batch_size: Of all trainings.
        fits: Lengths of trainings after each of which fine-tuning alone is run.
    """

    dataset: ImageName
    network: Literal["small", "resnet-18"]
    train: int
    val: int
    test: int
    epochs: int
    lr: float
    batch_size: int = 64
    fits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Preset:
    """Everything that is run.

    Attributes:
        linear: The linear model.
        tasks: Data sets.
        classes: Class numbers; each is a request of its own.
        steps: Optimizer steps of every pass.
        long_steps: Steps of one more pass of fine-tuning.
        alphas: Weights of the second term of CE-FT and ICE-FT.
        alpha_lr_scale: Factor on the learning rate for both of them in that sweep.
        keeps: Shares of the weights that masks keep.
        attack_samples: At most so many retain and test images train the membership attack.
        seeds: Repetitions; a seed draws images, start and order.
        accelerator: As `Trainer` takes it.
    """

    linear: Linear
    tasks: tuple[Task, ...]
    classes: tuple[int, ...]
    steps: int
    long_steps: int
    alphas: tuple[float, ...]
    alpha_lr_scale: float
    keeps: tuple[float, ...]
    attack_samples: int
    seeds: int
    accelerator: str = "cpu"

    def task(self, name: str) -> Task:
        """The task of that data set."""
        return next(task for task in self.tasks if task.dataset == name)


@dataclass(frozen=True)
class Job:
    """One unit of work, the smallest thing that an interrupted study does again.

    Attributes:
        kind: What is done.
        seed: Of everything that is drawn.
        task: Data set; none for the linear model.
        forgotten: Class number; all of them for `"fit"`, none for the linear model.
    """

    kind: Literal["linear", "class", "fit"]
    seed: int
    task: str = ""
    forgotten: int = -1

    @property
    def key(self) -> str:
        """Its name in the JSON."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


def jobs_of(preset: Preset) -> list[Job]:
    """All jobs; none waits for another. Long ones first."""
    jobs = [
        Job("class", seed, task.dataset, forgotten)
        for seed in range(preset.seeds)
        for task in preset.tasks
        for forgotten in preset.classes
    ]
    jobs += [Job("fit", seed, task.dataset) for seed in range(preset.seeds) for task in preset.tasks if task.fits]
    return jobs + [Job("linear", seed) for seed in range(preset.linear.seeds)]


_LINEAR = Linear(
    features=120,
    samples=20,
    shares=(0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0),
    share=0.2,
    tuned=(0, 4, 8, 12, 16, 20),
    tuned_part=12,
    keeps=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    seeds=20,
)
_SWEEPS: dict[str, Any] = {
    "alphas": (0.05, 0.2, 0.5, 1.0),
    "alpha_lr_scale": 0.1,
    "keeps": (0.3, 0.5, 0.7, 0.9),
}

PRESETS = {
    "smoke": Preset(
        linear=Linear(24, 4, (0.0, 0.5, 1.0), 0.5, (0, 2, 4), 2, (0.5, 1.0), 2),
        tasks=(
            Task("Fashion-MNIST", "small", 100, 30, 60, 1, 0.03, 25),
            Task("CIFAR-10", "small", 100, 30, 60, 1, 0.03, 25, fits=(1,)),
        ),
        classes=(3,),
        steps=2,
        long_steps=4,
        alphas=(0.2, 1.0),
        alpha_lr_scale=0.1,
        keeps=(0.5,),
        attack_samples=50,
        seeds=1,
    ),
    "cpu": Preset(
        linear=_LINEAR,
        tasks=(
            Task("Fashion-MNIST", "small", 5_000, 1_000, 2_000, 20, 0.03, fits=(5, 20)),
            Task("CIFAR-10", "small", 5_000, 1_000, 2_000, 25, 0.03, fits=(5, 10, 15, 25)),
        ),
        classes=(3, 6, 9),
        steps=50,
        long_steps=250,
        attack_samples=2_000,
        seeds=3,
        **_SWEEPS,
    ),
    "paper": Preset(
        linear=_LINEAR,
        tasks=(Task("CIFAR-10", "resnet-18", 45_000, 5_000, 10_000, 60, 0.1, 256),),
        classes=(3, 6, 9),
        steps=500,
        long_steps=1_700,
        attack_samples=2_000,
        seeds=3,
        accelerator="auto",
        **_SWEEPS,
    ),
}
"""`paper` has its network and one of its data sets; its lengths are ours."""
