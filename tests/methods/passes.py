"""Forgetting passes in real Trainers, and the same passes as plain loops."""

import copy

import torch
from lightning import Callback, seed_everything
from torch.nn import functional

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from lightning_unlearn.utilities.batch_adapter import BatchAdapter
from tests.modules.cases import User, loader, trainer

FORGET = range(0, 40, 3)


class Answering(User):
    """An ordinary classifier with a `forward`; dropout where asked for."""

    def __init__(self, lr=0.2, norm=True, dropout=0.0):
        super().__init__(lr, norm)
        if dropout:
            self.net.append(torch.nn.Dropout(dropout))

    def forward(self, x):
        return self.net(x)


class Drawn(BatchAdapter):
    """Keeps the labels it draws."""

    def __init__(self):
        super().__init__()
        self.true, self.drawn = [], []

    def wrong_targets(self, targets, n_classes, *, avoid_true=True):
        self.true.append(targets)
        self.drawn.append(super().wrong_targets(targets, n_classes, avoid_true=avoid_true))
        return self.drawn[-1]


class Seen(Callback):
    """Keeps every batch, and the weights before the first and after every step."""

    def __init__(self):
        self.batches, self.weights, self.epochs = [], [], []

    def on_train_start(self, trainer, pl_module):
        self._keep(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(copy.deepcopy(batch))
        self.epochs.append(trainer.current_epoch)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self._keep(pl_module)

    def _keep(self, module):
        self.weights.append({name: one.detach().clone() for name, one in module.named_parameters()})


def run(method, model=None, *, adapter=None, data=None, **settings):
    """Run a pass on a copy of `model`: the trained module, and what was seen."""
    seed_everything(3, verbose=False)
    module = copy.deepcopy(model) if model is not None else Answering()
    seen = Seen()
    parts = (data or UnlearningDataModule(loader(), FORGET, seed=5)).with_parts(method.parts)
    wrapped = UnlearningModule(module, method, adapter=adapter)
    limits = {"max_steps": method.max_steps, "max_epochs": method.max_epochs}
    limits = {key: value for key, value in limits.items() if value is not None}
    try:
        trainer(**limits, callbacks=[seen], **settings).fit(wrapped, datamodule=parts)
    finally:
        wrapped.unwrap()
    return module, seen


def plain(model, batches, loss_of, lr, *, before_step=None):
    """The same in plain torch: SGD with momentum 0.9 on `loss_of(module, batch, step)`, from a copy of `model`."""
    module = copy.deepcopy(model)
    module.train()
    optimizer = torch.optim.SGD(module.net.parameters(), lr=lr, momentum=0.9)
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss_of(module, batch, step).backward()
        if before_step is not None:
            before_step(module)
        optimizer.step()
    return module


def cross_entropy(module, batch):
    """The user's loss on a retain batch: statistics are learnt."""
    return functional.cross_entropy(module.net(batch[0]), batch[1])


def answers_without_statistics(module, x):
    """Logits normalised with the batch's statistics, of which nothing is kept: what forget batches get."""
    for layer in module.net:
        if isinstance(layer, torch.nn.BatchNorm1d):
            x = functional.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
        else:
            x = layer(x)
    return x


def assert_close(module, twin):
    """Weights and statistics agree up to rounding."""
    mine, theirs = module.net.state_dict(), twin.net.state_dict()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)
