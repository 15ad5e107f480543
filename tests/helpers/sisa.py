"""A small SISA training: a module with dropout, BatchNorm and momentum that notes which samples it is trained on."""

import torch
from lightning import LightningModule
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.procedures.sisa import SisaTraining

ROWS, CLASSES, BATCH, SHARDS, SLICES, EPOCHS = 40, 3, 4, 2, 3, 4
SETTINGS = {"epochs": EPOCHS, "shards": SHARDS, "slices": SLICES, "seed": 3}
TRAINER = {"accelerator": "cpu", "devices": 1}

SEEN = []
"""Positions of every training batch of every `Noted`, in order; tests clear it."""


class Noted(LightningModule):
    """Everything that draws or remembers: dropout, running statistics, momentum."""

    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, CLASSES)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        SEEN.append(batch[2].tolist())
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)}


def dataset(rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator)
    return TensorDataset(x, x[:, :CLASSES].argmax(1), torch.arange(rows))


def loader(rows=ROWS, **settings):
    return DataLoader(dataset(rows), **{"batch_size": BATCH, "shuffle": True, **settings})


def training(folder, **settings):
    return SisaTraining(folder, **{"module_factory": Noted, "trainer": TRAINER, **SETTINGS, **settings})


def parts(sisa):
    """Ids of every (shard, slice), deleted ones as well."""
    found = {}
    for one, place in sisa._manifest().assignment.items():
        found.setdefault(place, []).append(one)
    return found


def same(first, second):
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def files(folder):
    """Names of all files but the manifest."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.parent != folder
    )
