"""A trained linear classifier of three blobs with some wrong labels, and methods that tell what was done with them."""

import os
import sys
import time
from dataclasses import field
from pathlib import Path
from typing import ClassVar

import torch
from lightning import LightningDataModule, LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.methods.base import hyperparameters
from lightning_unlearn.methods.fine_tune import FineTune
from lightning_unlearn.methods.search_space import Choices, FloatRange, IntRange
from lightning_unlearn.tuning import Objective, tune
from tests.helpers.models import quiet_trainer

FORGET = list(range(0, 30, 3))
TRAINER = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
           "enable_model_summary": False}  # fmt: skip


def blobs(n, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.nn.functional.one_hot(y, 3) * 1.5 + torch.randn(n, 3, generator=generator), y


class Blobs(LightningDataModule):
    """Sixty rows to train on, of which ten have a wrong label; forty to validate with; forty to test with."""

    def __init__(self):
        super().__init__()
        x, y = blobs(60, 0)
        y[FORGET] = (y[FORGET] + 1) % 3
        self.train_set = TensorDataset(x, y)
        self.val_set, self.test_set = TensorDataset(*blobs(40, 1)), TensorDataset(*blobs(40, 2))

    def train_dataloader(self):
        return DataLoader(self.train_set, 10, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_set, 40)

    def test_dataloader(self):
        return DataLoader(self.test_set, 40)


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def trained():
    seed_everything(0, verbose=False)
    module = Linear()
    quiet_trainer(max_epochs=5).fit(module, Blobs().train_dataloader())
    return module


@hyperparameters
class Noting(FineTune):
    """Fine-tuning that writes a line into a file when a pass begins, and may wait, break or read what it should not.

    With `company` it waits until so many processes have written one.
    """

    search_space: ClassVar = {"lr_scale": FloatRange(0.01, 3, log=True), "max_steps": IntRange(2, 12)}

    log: str | None = field(default=None, repr=False)
    seconds: float = field(default=0.0, repr=False)
    company: int = field(default=1, repr=False)
    peeks: bool = field(default=False, repr=False)
    breaks_above: float = field(default=float("inf"), repr=False)

    def prepare(self, host):
        if self.log is not None:
            with open(self.log, "a") as stream:
                stream.write(f"{self.lr_scale!r} {self.max_steps} {os.getpid()}\n")
            deadline = time.monotonic() + 120
            while len({line.split()[2] for line in Path(self.log).read_text().splitlines()}) < self.company:
                if time.monotonic() > deadline:
                    raise TimeoutError("no other process began a trial")
                time.sleep(0.05)
        time.sleep(self.seconds)
        if self.peeks and self.lr_scale != 1 / 3:
            host.trainer.datamodule.test_dataloader()
        if self.lr_scale > self.breaks_above:
            raise ArithmeticError("too large a rate")


@hyperparameters
class Finite(FineTune):
    """Four settings and no more."""

    search_space: ClassVar = {"lr_scale": Choices((0.1, 1 / 3)), "max_steps": Choices((5, 50))}


def noted(path):
    """The settings of the passes that began."""
    return [tuple(line.split()[:2]) for line in Path(path).read_text().splitlines()]


def study(storage, log, seconds=0.0, company=1, **settings):
    """One call of `tune`."""
    method = Noting(log=str(log), seconds=seconds, company=company, max_steps=5)
    return tune(
        trained(), FORGET, methods=method, data=Blobs(), objective=Objective("bias_removal", 0.5), trainer=TRAINER,
        storage=storage, pruner=None, **settings,
    )  # fmt: skip


if __name__ == "__main__":
    study(sys.argv[1], sys.argv[2], seconds=float(sys.argv[3]), trials=int(sys.argv[4]))
