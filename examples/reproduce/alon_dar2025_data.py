"""What a seed draws for `alon_dar2025.py`: images, the forgotten ones, and their wrong labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from alon_dar2025_settings import Task
from images import load_images, normalised
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Drawn", "StudyData", "draw"]


@dataclass(frozen=True)
class Drawn:
    """The data of a seed. The first images of the training set are the ones to forget.

    Attributes:
        images: float32 (N, channels, height, width), to train on.
        labels: int64 (N,).
        wrong_labels: As `labels`, but for the images to forget: there another class, drawn uniformly.
        validation: Images and labels to tune on.
        test: Images and labels to report on.
        forgotten: Number of images to forget.
    """

    images: Tensor
    labels: Tensor
    wrong_labels: Tensor
    validation: TensorDataset
    test: TensorDataset
    forgotten: int

    @property
    def ids(self) -> list[int]:
        """Positions of the images to forget."""
        return list(range(self.forgotten))


def draw(task: Task, root: Path, seed: int) -> Drawn:
    """The data of a seed; no image is in two parts.

    Raises:
        ValueError: the data are too few.
    """
    found = load_images(root, task.dataset)
    generator = torch.Generator().manual_seed(seed)
    for name, wanted, labels in (
        ("training", task.train + task.validation, found.train_labels), ("test", task.test, found.test_labels)
    ):  # fmt: skip
        if wanted > len(labels):
            raise ValueError(f"Expected at least {wanted:,} {name} images, but got {len(labels):,}.")
    rows = torch.randperm(len(found.train_labels), generator=generator)[: task.train + task.validation]
    held = torch.randperm(len(found.test_labels), generator=generator)[: task.test]
    train, validation = rows[: task.train], rows[task.train :]
    labels, wrong = found.train_labels[train], found.train_labels[train].clone()
    wrong[: task.forgotten] += torch.randint(1, 10, (task.forgotten,), generator=generator)
    return Drawn(
        images=normalised(found.train[train], task.dataset),
        labels=labels,
        wrong_labels=wrong % 10,
        validation=TensorDataset(normalised(found.train[validation], task.dataset), found.train_labels[validation]),
        test=TensorDataset(normalised(found.test[held], task.dataset), found.test_labels[held]),
        forgotten=task.forgotten,
    )


class StudyData(LightningDataModule):
    """Training data with right or wrong labels, and validation data. Test data are not part of it.

    Args:
        drawn: What the seed drew.
        labels: Of the training images.
        batch_size: Of every loader that trains.
        seed: Of the order.
        retained: Leave the images to forget out: what a retrained model sees.
    """

    def __init__(self, drawn: Drawn, labels: Tensor, batch_size: int, seed: int, *, retained: bool = False) -> None:
        super().__init__()
        start = drawn.forgotten if retained else 0
        self.train = TensorDataset(drawn.images[start:], labels[start:])
        self.validation, self.batch_size, self.seed = drawn.validation, batch_size, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """In an order that the seed gives."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        """To tune on."""
        return DataLoader(self.validation, 500)
