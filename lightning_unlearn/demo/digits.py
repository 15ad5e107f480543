"""A user's code as it could have been before they heard of this package: a module and a datamodule for digits."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["N_CLASSES", "DigitsCNN", "DigitsData"]

N_CLASSES = 10


class DigitsCNN(LightningModule):
    """A small convolutional network with BatchNorm (38 k parameters), SGD with momentum and a cosine schedule.

    Args:
        lr: Learning rate.
    """

    def __init__(self, lr: float = 0.03) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, N_CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (N, 10) for images of shape (N, 1, 8, 8)."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """SGD with momentum 0.9, cosine over the run."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """All images, (1797, 1, 8, 8) in [0, 1], and labels; read once, since every training makes its own datamodule."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(digits.target, dtype=torch.int64)


class DigitsData(LightningDataModule):
    """scikit-learn's 1,797 handwritten digits, 80 % to train and 20 % to test, with two contributors marked.

    Contributor "mislabelled" gave 20 images with wrong labels (each one class too high), "clean" gave 20 with right
    ones, "bystander" is an innocent contributor of the same size: the placebo.

    Args:
        seed: Decides the split, the contributors and the order of the batches.
        per_contributor: Images per contributor.
        batch_size: Images per batch.
    """

    def __init__(self, seed: int = 0, per_contributor: int = 20, batch_size: int = 64) -> None:
        super().__init__()
        self.seed = seed
        self.batch_size = batch_size
        images, labels = _digits()
        order = np.random.default_rng(seed).permutation(len(labels))
        n_train = round(0.8 * len(labels))
        train, test = order[:n_train], order[n_train:]
        self.true_labels = labels[train]
        # The order is random already, so the first rows of the training set are a random choice.
        rows = np.arange(3 * per_contributor).reshape(3, per_contributor)
        self.contributors = {
            name: tuple(map(int, rows[number])) for number, name in enumerate(("mislabelled", "clean", "bystander"))
        }
        given = self.true_labels.clone()
        wrong = torch.tensor(self.contributors["mislabelled"])
        given[wrong] = (given[wrong] + 1) % N_CLASSES
        self.train_set = TensorDataset(images[train], given)
        self.test_set = TensorDataset(images[test], labels[test])

    @property
    def subjects(self) -> list[str | None]:
        """Contributor of every training row, `None` where there is none."""
        subjects: list[str | None] = [None] * len(self.train_set)
        for name, rows in self.contributors.items():
            for row in rows:
                subjects[row] = name
        return subjects

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled by a generator of its own, so that a fresh datamodule repeats the order."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, generator=generator)

    def test_dataloader(self) -> DataLoader[Any]:
        """All test images."""
        return DataLoader(self.test_set, 512)
