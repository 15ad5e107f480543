"""A small recorded training: an (x, y) classifier with BatchNorm and dropout-free forward, and its store."""

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning import LightningModule, seed_everything
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.models import quiet_trainer

ROWS, TEST_ROWS, CLASSES, BATCH, EPOCHS = 64, 200, 3, 8, 3


class XYClassifier(LightningModule):
    """An ordinary classifier of (x, y) batches."""

    def __init__(self, lr=0.05, momentum=0.9):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES))
        self.fixed = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(parameters, lr=self.hparams.lr, momentum=self.hparams.momentum)


def datasets(seed=0, wrong=()):
    """Training and test set; `wrong` rows carry the next class."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS + TEST_ROWS, 6, generator=generator)
    y = x[:, :CLASSES].argmax(1)
    y[list(wrong)] = (y[list(wrong)] + 1) % CLASSES
    return TensorDataset(x[:ROWS], y[:ROWS]), TensorDataset(x[ROWS:], y[ROWS:])


class EpochOrder(Sampler):
    """A random order that depends on the epoch alone, so that a plain loop can repeat what a Trainer did."""

    def __init__(self, rows=ROWS):
        self.rows, self.epoch = rows, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(1000 + self.epoch)
        return iter(torch.randperm(self.rows, generator=generator).tolist())

    def __len__(self):
        return self.rows


def batches_of(epoch):
    """The positions of each batch of an epoch."""
    order = EpochOrder()
    order.set_epoch(epoch)
    return torch.tensor(list(order)).split(BATCH)


def loaders(seed=0, wrong=()):
    """Fresh loaders, whose order depends on the epoch alone."""
    train, test = datasets(seed, wrong)
    return {"train": DataLoader(train, BATCH, sampler=EpochOrder()), "test": DataLoader(test, 64)}


@dataclass
class Recorded:
    """A trained module, where its store is, and the weights it started from."""

    model: XYClassifier
    url: str
    initial: dict

    @property
    def store(self):
        return DeltaStore.open(self.url)


def record(
    folder: Path, seed=0, wrong=(), momentum=0.9, callbacks=(), epochs=EPOCHS, train=None, **settings
) -> Recorded:
    """Train with a recorder; float32 values and keep = 1 unless told otherwise."""
    settings = {"keep": 1.0, "value_dtype": "float32", **settings}
    url = str(folder / "store")
    seed_everything(seed, verbose=False)
    model = XYClassifier(momentum=momentum)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recorder = DeltaRecorder(url, **settings)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[*callbacks, recorder])
    trainer.fit(model, loaders(seed, wrong)["train"] if train is None else train)
    return Recorded(model, url, initial)
