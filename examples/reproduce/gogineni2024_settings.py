"""What is run at which size: the presets of `gogineni2024.py`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from images import ImageName

__all__ = ["PLACEMENTS", "PRESETS", "PRUNES", "SETS", "Job", "Preset", "Task", "jobs_of"]

PLACEMENTS = ("shuffled", "grouped")
"""Ordinary shuffling, or `SubjectGrouping` of the forget sets and their placebos."""
SETS = ("class", "samples")
"""A class that has few images, and images drawn at random; grouped, the latter are one subject's."""
PRUNES: dict[str, tuple[Literal["step", "sum"], Literal["magnitude", "random"]]] = {
    "step, magnitude": ("step", "magnitude"),
    "sum, magnitude": ("sum", "magnitude"),
    "step, random": ("step", "random"),
}
"""Label -> when it is pruned, and which entries are kept."""


@dataclass(frozen=True)
class Task:
    """A data set, and how a network is trained on it.

    Attributes:
        images: The data set, and the name of the task.
        train_samples: Training images, the class that is forgotten among them.
        test_samples: Held-out images; those of the class that is forgotten are looked at separately.
        forget_class: The class that has few images.
        class_images: How many it has.
        samples: Images of the other forget set.
        width: Channels of the first convolution.
        epochs: Length of the training.
        batch_size: Of the training and of every pass.
        lr: Of SGD with momentum 0.9, annealed along a cosine.
    """

    images: ImageName
    train_samples: int
    test_samples: int
    forget_class: int
    class_images: int
    samples: int
    width: int
    epochs: int
    batch_size: int
    lr: float


@dataclass(frozen=True)
class Preset:
    """Tasks, what is tried on them, and how often.

    Attributes:
        tasks: What is trained.
        keeps: Fractions that partial amnesiac subtracts; 1 is amnesiac.
        fractions: Fractions of a layer that an update may change; 1 is the naive form.
        masks: Which entries these are.
        control_fractions: Further fractions for the two controls, drawn entries and smaller rates: what they lose and
            forget changes quickly near 1.
        repair_steps: Steps of fine-tuning, where there is a repair.
        update_steps: Optimizer steps of label flipping and of gradient ascent, the same in every form.
        probe_samples: Retain samples in the probe of a pass.
        seeds: Repetitions; a seed draws images, forget sets, placebos, initial weights and order.
        accelerator: As `Trainer` takes it.
    """

    tasks: tuple[Task, ...]
    keeps: tuple[float, ...]
    fractions: tuple[float, ...]
    masks: tuple[Literal["magnitude", "random", "cyclic", "fixed"], ...]
    control_fractions: tuple[float, ...]
    repair_steps: int
    update_steps: int
    probe_samples: int
    seeds: int
    accelerator: str = "cpu"

    def task(self, name: str) -> Task:
        """The task of that name."""
        return next(task for task in self.tasks if task.images == name)


@dataclass(frozen=True)
class Job:
    """One unit of work, the smallest thing that an interrupted study does again.

    Attributes:
        kind: Algorithm 1, algorithms 2 and 3, or the size of stores.
        task: Name of the task.
        seed: Of everything that is drawn.
        placement: Where the samples to forget are in the training.
    """

    kind: Literal["amnesiac", "updates", "storage"]
    task: str
    seed: int
    placement: str = "shuffled"

    @property
    def key(self) -> str:
        """Its name in the JSON."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


def jobs_of(preset: Preset) -> list[Job]:
    """All jobs, long ones first; none waits for another."""
    drawn = [(task.images, seed) for task in reversed(preset.tasks) for seed in range(preset.seeds)]
    found = [Job("amnesiac", *one, placement) for placement in PLACEMENTS for one in drawn]
    return [*found, *(Job("updates", *one) for one in drawn), *(Job("storage", *one) for one in drawn)]


_MNIST = Task(
    images="MNIST",
    train_samples=6_000,
    test_samples=2_000,
    forget_class=3,  # and 100 images of it, as in the notebook of Graves et al.
    class_images=100,
    samples=60,
    width=16,
    epochs=4,
    batch_size=32,
    lr=0.01,
)
_CIFAR = replace(_MNIST, images="CIFAR-10", forget_class=1, epochs=12)


def _smoke(task: Task) -> Task:
    return replace(
        task, train_samples=160, test_samples=100, class_images=8, samples=6, width=4, epochs=2, batch_size=16
    )


PRESETS = {
    "smoke": Preset(
        tasks=(_smoke(_MNIST),),
        keeps=(0.1, 1.0),
        fractions=(0.1, 1.0),
        masks=("magnitude",),
        control_fractions=(),
        repair_steps=2,
        update_steps=2,
        probe_samples=32,
        seeds=1,
    ),
    "cpu": Preset(
        tasks=(_MNIST, _CIFAR),
        keeps=(0.001, 0.01, 0.03, 0.1, 0.3, 1.0),
        fractions=(0.01, 0.03, 0.1, 0.3, 1.0),
        masks=("magnitude", "random", "cyclic"),
        control_fractions=(0.2, 0.6),
        repair_steps=50,
        update_steps=30,
        probe_samples=500,
        seeds=3,
    ),
}
PRESETS["full"] = replace(
    PRESETS["cpu"],
    tasks=(
        replace(_MNIST, train_samples=50_000, test_samples=10_000, samples=500, width=32, batch_size=64),
        replace(_CIFAR, train_samples=40_000, test_samples=10_000, samples=400, width=32, batch_size=64),
    ),
    accelerator="auto",
)
"""Larger, and not the paper's: its networks, fractions and sizes were not at hand."""
