"""Small recorded trainings in float64, and plain loops that do them again in other ways."""

import copy
from contextlib import contextmanager

import torch
from lightning import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.api import unlearn
from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.models import quiet_trainer

ROWS, BATCH, EPOCHS = 24, 6, 3
SGD = torch.optim.SGD


def dataset(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64) + 0.5 * noise)


class Regressor(LightningModule):
    """Linear regression, or a small network with tanh; loss only, no logits."""

    def __init__(self, optimizer=SGD, schedule=None, hidden=0, extra=(), **settings):
        super().__init__()
        layers = [nn.Linear(4, hidden), nn.Tanh(), *extra, nn.Linear(hidden, 1)] if hidden else [nn.Linear(4, 1)]
        self.net = nn.Sequential(*layers).double()
        self.made = (optimizer, schedule, settings)

    def loss(self, x, y, weights=None):
        error = (self.net(x)[:, 0] - y).square()
        return error.mean() if weights is None else (weights * error).mean()

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        optimizer, schedule, settings = self.made
        built = optimizer(self.net.parameters(), **{"lr": 0.05, **settings})
        if schedule is None:
            return built
        return {"optimizer": built, "lr_scheduler": {"scheduler": schedule[0](built), "interval": schedule[1]}}


def loader(data=None):
    return DataLoader(dataset() if data is None else data, BATCH, shuffle=True)


def fit(folder, module, *, seed=5, epochs=EPOCHS, trainer=None, train=None, **recorder):
    """Train with a recorder; returns the untrained module and the store."""
    seed_everything(seed, verbose=False)
    with torch.no_grad():
        for one in module.parameters():
            one.uniform_(-0.5, 0.5)
    initial = copy.deepcopy(module)
    settings = {"keep": 1.0, "value_dtype": "float32", **recorder}
    recorded = DeltaRecorder(folder, **settings)
    trainer = dict(trainer or {})
    callbacks = [*trainer.pop("callbacks", ()), recorded]
    quiet_trainer(max_epochs=epochs, callbacks=callbacks, **trainer).fit(module, train or loader())
    return initial, DeltaStore.open(folder)


@contextmanager
def _schedule(module):
    made = module.configure_optimizers()
    if isinstance(made, dict):
        yield made["optimizer"], made["lr_scheduler"]["scheduler"], made["lr_scheduler"]["interval"]
    else:
        yield made, None, None


def loop(initial, store, gradient_loss, *, skips=lambda step, ids: False, steps=None):
    """The recorded steps in a plain loop of torch: `gradient_loss(module, step, ids)` is what is differentiated."""
    module = copy.deepcopy(initial)
    per_epoch = -(-ROWS // BATCH)
    with _schedule(module) as (optimizer, schedule, interval):
        for step in range(store.n_steps if steps is None else steps):
            ids = list(store.record(step).sample_ids)
            if not skips(step, ids):
                optimizer.zero_grad()
                gradient_loss(module, step, ids).backward()
                optimizer.step()
            if schedule is not None and (interval == "step" or (step + 1) % per_epoch == 0):
                schedule.step()
    return module


def twin(initial, store, forget, steps=None):
    """The recorded run without some samples."""
    x, y = dataset().tensors

    def loss(module, step, ids):
        kept = [one for one in ids if one not in forget]
        return module.loss(x[kept], y[kept])

    return loop(initial, store, loss, skips=lambda step, ids: set(ids) <= set(forget), steps=steps)


def forget(module, store, ids, method, data=None, **settings):
    settings = {"probe_samples": 0, "batch_norm": "keep", "record": False, **settings}
    return unlearn(module, ids, method=method, data=data or loader(), store=store, **settings).model


def flat(module):
    return torch.cat([one.detach().flatten() for one in module.parameters()])


def cosine(steps):
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
