"""Real passes of a method whose batches are kept, for loops in plain torch that repeat them."""

import copy

import torch
from lightning import Callback
from torch.nn import functional

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from tests.modules.cases import User, loader, trainer

FORGET = range(0, 40, 3)
LR, MOMENTUM, DECAY = 0.05, 0.9, 0.01


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


class Classifier(User):
    """With a `forward`, which adapters ask."""

    def forward(self, x):
        return self.net(x)


class YesNo(Classifier):
    """The same targets as three yes/no questions."""

    def training_step(self, batch, batch_idx):
        return functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


class Seen(Callback):
    """The batches of every step, with the number of their epoch, and the weights after each epoch."""

    def __init__(self):
        self.batches, self.weights = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        kept = {part: [tensor.clone() for tensor in one] for part, one in batch.items()}
        self.batches.append((trainer.current_epoch, kept))

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append({name: one.detach().clone() for name, one in pl_module.state_dict().items()})


def run(method, model, data=None, forget=FORGET, callbacks=(), **settings):
    """Run a pass on a copy of the model; the copy, and what was seen."""
    copied, seen = copy.deepcopy(model), Seen()
    wrapped = UnlearningModule(copied, method)
    source = UnlearningDataModule(loader() if data is None else data, forget, seed=5)
    limits = {"max_steps": method.max_steps or -1, "max_epochs": method.max_epochs or -1, "limit_val_batches": 0}
    if method.schedule is not None:
        limits["reload_dataloaders_every_n_epochs"] = 1
    try:
        fitted = trainer(**{**limits, **settings}, callbacks=[seen, *callbacks])
        fitted.fit(wrapped, datamodule=source.with_parts(method.parts, method.schedule))
    finally:
        wrapped.unwrap()
    return copied, seen


def plain(model, batches, loss_of):
    """Plain SGD on a copy of the model, one step for each of the batches; `loss_of(model, parts)` is the loss."""
    copied = copy.deepcopy(model)
    copied.train()
    optimizer = sgd(copied.parameters())
    for _, parts in batches:
        optimizer.zero_grad()
        loss_of(copied, parts).backward()
        optimizer.step()
    return copied


def logits_without_learning(net, x):
    """Normalised with the batch; no running statistic learns from it."""
    for layer in net:
        is_norm = isinstance(layer, torch.nn.BatchNorm1d)
        x = functional.batch_norm(x, None, None, layer.weight, layer.bias, training=True) if is_norm else layer(x)
    return x


def logits_by_running_statistics(net, x):
    """Normalised with the running statistics, everything else as in training."""
    layers = [layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm1d)]
    for layer in layers:
        layer.eval()
    logits = net(x)
    for layer in layers:
        layer.train()
    return logits


def pretrained(kind=Classifier, **settings):
    """A module that has learnt a little, so that its answers and running statistics are not those of a fresh one."""
    model = kind(**settings)
    x, y = loader().dataset.tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        functional.cross_entropy(model.net(x), y).backward()
        optimizer.step()
    return model


def assert_same_weights(one, other, rtol=1e-5, atol=1e-6):
    """Parameters and running statistics agree."""
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol, msg=lambda text, name=name: name + text)
