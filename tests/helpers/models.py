"""Small but awkward models and data: what breaks naive code is in every one of them."""

import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

FEATURES, CLASSES = 6, 3


class IdDataset(Dataset):
    """Classification data whose samples carry their own index, so recorded ids can be compared with contents.

    A sample is `{"x": (6,) float32, "y": int64, "index": int64}`; `keys` adds `"key"` (a string per row).
    """

    def __init__(self, length=40, seed=0, keys=False):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(length, FEATURES, generator=generator)
        self.y = (self.x[:, :CLASSES].argmax(1) + torch.randint(0, 2, (length,), generator=generator)) % CLASSES
        self.keys = keys

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        sample = {"x": self.x[index], "y": self.y[index], "index": torch.tensor(index)}
        return {**sample, "key": f"row-{index}"} if self.keys else sample


class AwkwardNet(nn.Module):
    """BatchNorm, a free parameter, tied weights, and a frozen layer."""

    def __init__(self, width=8):
        super().__init__()
        self.inp = nn.Linear(FEATURES, width)
        self.norm = nn.BatchNorm1d(width)
        self.scale = nn.Parameter(torch.ones(()))
        self.mix = nn.Linear(width, width, bias=False)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.mix.weight
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        hidden = functional.relu(self.norm(self.inp(x)))
        return self.head(self.scale * self.frozen(functional.relu(self.tied(self.mix(hidden)))))


def momentum_sgd(parameters):
    """The optimizer of a `BoringClassifier` that is not told otherwise."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class BoringClassifier(LightningModule):
    """An ordinary user's module around `AwkwardNet`; it keeps the indices of every training batch it saw.

    Args:
        optimizer: Function from the trainable parameters to an optimizer, SGD with momentum by default.
        seed: Seed of the initial weights; the global random state is left alone.
    """

    def __init__(self, optimizer=None, seed=0, width=8):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = AwkwardNet(width)
        self.make_optimizer = optimizer or momentum_sgd
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["index"].tolist())
        return functional.cross_entropy(self(batch["x"]), batch["y"])

    def configure_optimizers(self):
        return self.make_optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])


def loader(dataset=None, batch_size=8, **kwargs):
    """A shuffling loader over `IdDataset()` unless told otherwise."""
    if not {"sampler", "batch_sampler", "shuffle"} & kwargs.keys():
        kwargs["shuffle"] = True
    if "batch_sampler" in kwargs:
        return DataLoader(IdDataset() if dataset is None else dataset, **kwargs)
    return DataLoader(IdDataset() if dataset is None else dataset, batch_size=batch_size, **kwargs)


def quiet_trainer(**kwargs):
    """A real Trainer on one CPU that prints nothing and writes nothing."""
    defaults = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "log_every_n_steps": 1,
    }
    return Trainer(**{**defaults, **kwargs})
