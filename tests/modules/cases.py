"""Users' modules and methods for the tests of the wrapper."""

from typing import ClassVar

import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_unlearn.methods.loss_method import LossMethod, as_loss

FEATURES, CLASSES = 5, 3


def dataset(length=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(length, FEATURES, generator=generator), torch.randint(0, CLASSES, (length,), generator=generator)
    )


def loader(length=40, batch_size=8, **kwargs):
    return DataLoader(dataset(length), batch_size=batch_size, **{"shuffle": True, **kwargs})


def network(norm=True, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)]
    return nn.Sequential(*(layer for layer in layers if norm or not isinstance(layer, nn.BatchNorm1d)))


class User(LightningModule):
    """Logs a value and a metric object, has hyper-parameters and a schedule, returns a mapping."""

    def __init__(self, lr=0.2, norm=True):
        super().__init__()
        self.save_hyperparameters()
        self.net = network(norm)
        self.acc = MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        loss = functional.cross_entropy(logits, y)
        self.acc(logits, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_acc", self.acc, on_step=False, on_epoch=True)
        return {"loss": loss, "logits": logits.detach()}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Adversarial(LightningModule):
    """Manual optimization with two optimizers, a schedule, toggling and clipping."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = network(norm=True, seed=1)
        self.critic = network(norm=False, seed=2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        made = functional.cross_entropy(self.generator(x), y)
        first.zero_grad()
        self.manual_backward(made)
        self.clip_gradients(first, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        judged = functional.cross_entropy(self.critic(x), self.generator(x).argmax(1).detach())
        second.zero_grad()
        self.manual_backward(judged)
        second.step()
        self.untoggle_optimizer(second)
        self.lr_schedulers().step()
        self.log_dict({"made": made, "judged": judged})

    def configure_optimizers(self):
        first = torch.optim.SGD(self.generator.parameters(), lr=0.1)
        second = torch.optim.Adam(self.critic.parameters(), lr=0.01)
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 5, gamma=0.5)]


class Joint(LossMethod):
    """Retain loss minus a share of the forget loss."""

    guarantee: ClassVar = "heuristic"
    source: ClassVar = "a test"
    parts: ClassVar = ("forget", "retain")

    def __init__(self, ascent=0.3, **kwargs):
        super().__init__(**{"max_steps": 12, **kwargs})
        self.ascent = ascent

    def step(self, host, batch, batch_idx):
        forget = as_loss(host.user_step("forget", batch["forget"], batch_idx))
        retain = as_loss(host.user_step("retain", batch["retain"], batch_idx))
        return retain - self.ascent * forget


class Ascent(LossMethod):
    """Gradient ascent on the forget part alone."""

    guarantee: ClassVar = "heuristic"
    source: ClassVar = "a test"
    parts: ClassVar = ("forget",)

    def __init__(self, **kwargs):
        super().__init__(**{"max_steps": 3, **kwargs})

    def step(self, host, batch, batch_idx):
        return -as_loss(host.user_step("forget", batch["forget"], batch_idx))


class OwnLoss(LossMethod):
    """A loss that never calls the user's step."""

    guarantee: ClassVar = "heuristic"
    source: ClassVar = "a test"

    def __init__(self, **kwargs):
        super().__init__(**{"max_steps": 3, **kwargs})

    def step(self, host, batch, batch_idx):
        return host.net(batch["retain"][0]).square().mean()


def trainer(**kwargs):
    return Trainer(
        **{
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            **kwargs,
        }
    )


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
