"""Data sets, forgetting scenarios and a small network for `compare_methods.py`."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10

SCENARIOS = ("random", "class", "subclass", "mislabelled", "backdoor")
COARSE = {  # the coarse classes of "subclass", of which one fine class is forgotten
    "digits": (0, 1, 0, 1, 0, 1, 0, 1, 0, 1),
    "fashion-mnist": (0, 1, 0, 1, 0, 2, 0, 2, 3, 2),
    "cifar10": (0, 0, 1, 1, 1, 1, 1, 1, 0, 0),
}
"""Odd and even digits; tops, other clothes, shoes and bags; vehicles and animals."""

EPOCHS = {"digits": 20, "fashion-mnist": 6, "cifar10": 20}
SIZES = {"digits": (1200, 250, 347), "fashion-mnist": (10_000, 2_000, 2_500), "cifar10": (45_000, 5_000, 10_000)}
"""Training, validation and test rows."""


@dataclass(frozen=True)
class Task:
    """What is trained on, and what of it is to be forgotten.

    Attributes:
        train: Training rows, wrong labels and triggers included.
        val: Validation rows.
        test: Test rows, clean.
        forget: Positions in `train`.
        classes: Number of classes.
        epochs: Length of the training.
        true_targets: Right labels of the rows to forget, where theirs are wrong.
    """

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset
    forget: list[int]
    classes: int
    epochs: int
    true_targets: Tensor | None = None


class Data(LightningDataModule):
    """An ordinary datamodule."""

    def __init__(self, task: Task, batch_size: int = 64) -> None:
        super().__init__()
        self.task, self.batch_size = task, batch_size

    def train_dataloader(self) -> DataLoader:
        """Shuffled."""
        return DataLoader(self.task.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """What a stopping rule may look at."""
        return DataLoader(self.task.val, 500)

    def test_dataloader(self) -> DataLoader:
        """What nobody looks at before the end."""
        return DataLoader(self.task.test, 500)


class Network(LightningModule):
    """A small convolutional network with BatchNorm, and an ordinary training."""

    def __init__(self, channels: int = 1, size: int = 8, classes: int = 10, epochs: int = 20, lr: float = 0.03) -> None:
        super().__init__()
        self.save_hyperparameters()
        stride = 1 if size < 16 else 2
        side = -(-size // stride) // 2
        self.net = nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride, 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * side * side, 64), nn.ReLU(), nn.Linear(64, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Momentum, and a cosine over the training."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams.epochs)]


def _idx(path: Path) -> Tensor:
    """A file of the MNIST family, plain or gzipped."""
    raw = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, -1, 4 + 4 * len(shape)).reshape(shape).copy())


def _load(dataset: str, root: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images in [0, 1] and labels, for training and for test."""
    if dataset == "digits":
        digits = load_digits()
        x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y, held = x[order], y[order], SIZES[dataset][2]
        return x[held:], y[held:], x[:held], y[:held]
    if root is None:
        raise SystemExit(f"--data-root is needed for {dataset}")
    if dataset == "fashion-mnist":
        raw = Path(root) / "FashionMNIST" / "raw"
        parts = [
            _idx(raw / f"{part}-{kind}-ubyte") for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
        ]
        return parts[0][:, None] / 255, parts[1].long(), parts[2][:, None] / 255, parts[3].long()
    found = []
    for train in (True, False):
        cifar = CIFAR10(root, train=train)
        found += [torch.from_numpy(cifar.data).permute(0, 3, 1, 2) / 255, torch.tensor(cifar.targets)]
    return found[0], found[1], found[2], found[3]


def _triggered(x: Tensor) -> Tensor:
    """Images with a bright square in a corner."""
    x = x.clone()
    side = max(2, x.shape[-1] // 8)
    x[..., :side, :side] = 1.0
    return x


def make_task(
    dataset: str,
    scenario: str,
    seed: int,
    root: str | None = None,
    *,
    sizes: tuple[int, int, int] | None = None,
    forgotten: int | None = None,
) -> Task:
    """One scenario on one data set; rows are drawn with `seed`.

    Args:
        dataset: Key of `SIZES`.
        scenario: One of `SCENARIOS`.
        seed: Of the draw.
        root: Folder of the data.
        sizes: Training, validation and test rows, by default those of `SIZES`.
        forgotten: How many rows are forgotten where no class is, by default a hundredth, and 20 at least.
    """
    x, y, test_x, test_y = _load(dataset, root)
    n, held, tested = sizes or SIZES[dataset]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)[: n + held]
    x, y = x[order], y[order]
    val_x, val_y, x, y = x[n:], y[n:], x[:n].clone(), y[:n].clone()
    test_x, test_y, classes = test_x[:tested], test_y[:tested], 10
    some = torch.randperm(n, generator=generator)[: forgotten or max(20, n // 100)]
    true: Tensor | None = None
    if scenario == "class":
        forget = torch.nonzero(y == 3).flatten()
    elif scenario == "subclass":
        forget, coarse = torch.nonzero(y == 3).flatten(), torch.tensor(COARSE[dataset])
        y, val_y, test_y, classes = coarse[y], coarse[val_y], coarse[test_y], int(coarse.max()) + 1
    else:
        forget = some.sort().values
    if scenario == "mislabelled":
        true = y[forget].clone()
        y[forget] = (y[forget] + 1) % classes
    if scenario == "backdoor":
        true = y[forget].clone()
        x[forget], y[forget] = _triggered(x[forget]), 0
    sets = (TensorDataset(x, y), TensorDataset(val_x, val_y), TensorDataset(test_x, test_y))
    return Task(*sets, forget.tolist(), classes, EPOCHS[dataset], true)


def network_for(task: Task) -> Callable[[], LightningModule]:
    """Builds the network of a task."""
    _, channels, size, _ = task.train.tensors[0].shape
    return lambda: Network(channels, size, task.classes, task.epochs)
