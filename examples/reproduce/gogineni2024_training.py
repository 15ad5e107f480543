"""Data, network and training of `gogineni2024.py`, and what is measured of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gogineni2024_settings import Job, Task
from images import load_images, normalised
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_unlearn import SubjectGrouping
from lightning_unlearn.callbacks.leave_out import LeaveOut
from lightning_unlearn.functional.classifier_attacks import MIN_SAMPLES, logistic_attack
from lightning_unlearn.functional.membership import membership_auroc
from lightning_unlearn.functional.weight_distance import verification_error
from lightning_unlearn.procedures.outputs import ModelOutputs, collect_outputs

__all__ = ["QUIET", "Classifier", "ForgetSet", "Setting", "prepare"]

QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "devices": 1,
}  # fmt: skip
_RETAIN_LOOKED_AT = 1_000


class Classifier(LightningModule):
    """Two convolutions and two linear layers, 56 k parameters for MNIST and 71 k for CIFAR-10 at width 16.

    Normalised over groups of channels: without running statistics a subtraction is all that a subtraction does, and no
    pass on forget data can spoil them.
    """

    def __init__(self, task: Task, channels: int, side: int, steps: int) -> None:
        super().__init__()
        self.lr, self.steps, width = task.lr, steps, task.width
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.GroupNorm(4, 2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(2 * width * (side // 4) ** 2, 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        """SGD with momentum 0.9 and a cosine; without momentum no subtraction is safe (`docs/forgetting-study.md`)."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class ForgetSet:
    """Rows that are forgotten together, and an innocent group of the same size and placement.

    Attributes:
        name: One of `SETS`.
        rows: What is forgotten.
        placebo: For a class as many images of one other class; for random images as many others.
    """

    name: str
    rows: tuple[int, ...]
    placebo: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """What one task, seed and placement draws."""

    task: Task
    train: TensorDataset
    test: TensorDataset
    sets: tuple[ForgetSet, ...]
    seed: int
    placement: str
    accelerator: str

    def loader(self) -> DataLoader[Any]:
        """The training loader."""
        return DataLoader(self.train, self.task.batch_size, shuffle=True)

    @property
    def watched(self) -> list[int]:
        """All rows of forget sets and placebos."""
        return [row for one in self.sets for row in (*one.rows, *one.placebo)]

    @property
    def subjects(self) -> list[str | None]:
        """Forget sets and placebos are subjects, every other row is nobody's."""
        subjects: list[str | None] = [None] * len(self.train)
        for one in self.sets:
            for kind, rows in (("own", one.rows), ("placebo", one.placebo)):
                for row in rows:
                    subjects[row] = f"{one.name}-{kind}"
        return subjects

    def fit(self, *callbacks: Callback) -> Classifier:
        """One training; equal seeds give equal initial weights and order, whatever is left out or recorded."""
        seed_everything(self.seed, verbose=False)
        _, channels, side, _ = self.train.tensors[0].shape
        loader = self.loader()
        module = Classifier(self.task, channels, side, self.task.epochs * len(loader))
        grouping = [SubjectGrouping(self.subjects, seed=self.seed)] if self.placement == "grouped" else []
        trainer = Trainer(
            **QUIET, accelerator=self.accelerator, max_epochs=self.task.epochs, callbacks=[*grouping, *callbacks]
        )
        trainer.fit(module, loader)
        return module.cpu()

    def twin(self, one: ForgetSet) -> Classifier:
        """The same training without a forget set."""
        return self.fit(LeaveOut(one.rows))

    @cached_property
    def _retain_rows(self) -> list[int]:
        taken = set(self.watched)
        return [row for row in range(len(self.train)) if row not in taken][:_RETAIN_LOOKED_AT]

    def measure(self, model: LightningModule, twin: LightningModule, one: ForgetSet) -> dict[str, Any]:
        """Accuracies, membership of the forget set, and the distance of the weights to the twin's.

        To forget a class the held-out images of that class are the non-members, and test accuracy is that of the
        others. Where a pass has blown the model up, what is not finite is None.
        """

        def outputs(data: Any) -> ModelOutputs:
            return collect_outputs(model, DataLoader(data, 500))

        forget, retain = outputs(Subset(self.train, one.rows)), outputs(Subset(self.train, self._retain_rows))
        test = outputs(self.test)
        of_class = test.targets == self.task.forget_class
        chosen = of_class if one.name == "class" else torch.ones_like(of_class)
        kept = ~of_class if one.name == "class" else chosen
        row = {
            "forget_accuracy": _mean(forget.correct), "retain_accuracy": _mean(retain.correct),
            "test_accuracy": _mean(test.correct[kept]), "class_accuracy": _mean(test.correct[of_class]),
            "forget_loss": _mean(forget.losses), "verification_error": float(verification_error(model, twin)),
        }  # fmt: skip
        strangers = test.losses[chosen]
        usable = bool(forget.losses.isfinite().all() and strangers.isfinite().all())
        row["membership_auroc"] = float(membership_auroc(forget.losses, strangers)) if usable else None
        enough = min(len(strangers), len(one.rows)) >= MIN_SAMPLES
        attack = logistic_attack(forget.losses, strangers, n_splits=5, clip=100.0) if usable and enough else None
        row["membership_attack"] = None if attack is None else float(attack.mean())
        return row


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def prepare(task: Task, root: Path, job: Job, accelerator: str) -> Setting:
    """Draw images, forget sets and placebos. Rows of the training set are in random order, so a set may be a slice."""
    images = load_images(root, task.images)
    generator = torch.Generator().manual_seed(job.seed)
    pool = torch.randperm(len(images.train_labels), generator=generator)
    of_class = images.train_labels[pool] == task.forget_class
    few, others = pool[of_class][: task.class_images], pool[~of_class][: task.train_samples - task.class_images]
    order = torch.cat([few, others])[torch.randperm(task.train_samples, generator=generator)]
    labels = images.train_labels[order]
    held_out = torch.randperm(len(images.test_labels), generator=generator)[: task.test_samples]
    innocent = (task.forget_class + 1) % 10

    def rows(condition: Callable[[int], bool], count: int, taken: Sequence[int] = ()) -> tuple[int, ...]:
        found = [row for row in range(len(labels)) if condition(int(labels[row])) and row not in set(taken)][:count]
        if len(found) < count:
            raise ValueError(f"Expected {count} images of one kind in {task.images}, but got {len(found)}.")
        return tuple(found)

    own = rows(lambda label: label == task.forget_class, task.class_images)
    other = rows(lambda label: label == innocent, task.class_images)
    anything: Mapping[str, Any] = {"condition": lambda label: True, "count": task.samples}
    samples = rows(**anything, taken=[*own, *other])
    control = rows(**anything, taken=[*own, *other, *samples])
    return Setting(
        task=task,
        train=TensorDataset(normalised(images.train[order], task.images), labels),
        test=TensorDataset(normalised(images.test[held_out], task.images), images.test_labels[held_out]),
        sets=(ForgetSet("class", own, other), ForgetSet("samples", samples, control)),
        seed=job.seed,
        placement=job.placement,
        accelerator=accelerator,
    )
