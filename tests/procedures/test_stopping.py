"""Passes that end before their limits: by held-out data, and by a loss that broke."""

import math

import pytest
import torch
from lightning import LightningModule, seed_everything
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.api import unlearn
from lightning_unlearn.exceptions import NoEffectWarning, UnlearningWarning
from lightning_unlearn.methods import GradientAscent, NegGradPlus
from tests.helpers.models import quiet_trainer

FORGET = list(range(12))


class Memorises(LightningModule):
    """Wide enough to learn wrong labels by heart; notes the loss of every step."""

    def __init__(self, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 3))
        self.break_at, self.breaks = math.inf, lambda loss: loss * math.inf

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        return self.breaks(loss) if self.trainer.global_step >= self.break_at else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


def dataset(rows, seed, wrong=()):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator)
    y = x[:, :3].argmax(1)
    y[list(wrong)] = (y[list(wrong)] + 1) % 3
    return TensorDataset(x, y)


TRAIN, VAL = dataset(96, 0, FORGET), dataset(200, 1)


def loaders(val=True):
    found = {"train": DataLoader(TRAIN, 16, shuffle=True), "val": DataLoader(VAL, 64)}
    return found if val else {"train": found["train"]}


@pytest.fixture(scope="module")
def trained():
    seed_everything(0, verbose=False)
    model = Memorises()
    quiet_trainer(max_epochs=60).fit(model, loaders()["train"])
    return model


@torch.no_grad()
def loss(model, data, rows=None):
    x, y = data.tensors if rows is None else (tensor[rows] for tensor in data.tensors)
    return float(functional.cross_entropy(model.eval()(x), y))


def forget(model, method, **settings):
    settings = {"data": loaders(), "seed": 3, "trainer": {"accelerator": "cpu"}, "probe_samples": 0, **settings}
    return unlearn(model, FORGET, method=method, **settings)


@pytest.mark.parametrize(
    "method",
    [GradientAscent(max_steps=400, lr_scale=0.05), NegGradPlus(max_steps=400, check_every=2)],
    ids=lambda method: method.name,
)
def test_the_pass_ends_where_the_forget_loss_meets_that_of_held_out_data(trained, method):
    assert loss(trained, TRAIN, FORGET) < 0.2 < loss(trained, VAL)
    result = forget(trained, method)
    (stage,) = result.stages
    assert 0 < stage.steps < 400
    assert stage.steps % method.check_every == 0
    reached, held_out = loss(result.model, TRAIN, FORGET), loss(result.model, VAL)
    assert reached >= held_out
    (note,) = [one for one in result.notes if "was ended" in one]
    assert f"after {stage.steps} steps" in note
    assert f"({reached:.3f})" in note
    # one look earlier it had not got there
    shorter = type(method)(**{**method.settings, "max_steps": stage.steps - method.check_every, "stop": None})
    before = forget(trained, shorter).model
    assert loss(before, TRAIN, FORGET) < loss(before, VAL)


def test_what_was_never_learnt_is_not_pushed_at_all(trained):
    model = Memorises()
    with pytest.warns(NoEffectWarning, match="changed no weight"):
        result = forget(model, GradientAscent(max_steps=30), force=True)
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), model.parameters(), strict=True))
    assert result.stages[0].steps == 0
    assert any("before the first step" in note for note in result.notes)


def test_without_held_out_data_the_fixed_number_is_run_and_said(trained):
    with pytest.warns(UnlearningWarning, match="no validation data"):
        result = forget(trained, NegGradPlus(max_steps=7), data=loaders(val=False))
    assert result.stages[0].steps == 7
    assert any("no validation data" in note for note in result.notes)
    assert forget(trained, NegGradPlus(max_steps=7, stop=None), data=loaders(val=False)).stages[0].steps == 7


@pytest.mark.filterwarnings("ignore:Retain data before the pass:lightning_unlearn.exceptions.UnlearningWarning")
@pytest.mark.parametrize(
    "breaks", [lambda loss: loss * math.inf, lambda loss: loss + math.inf], ids=["with its gradient", "alone"]
)
def test_a_loss_that_breaks_ends_the_pass_and_gives_the_original_back(trained, breaks):
    """Where gradients are finite, the weights are as well: the loss alone tells."""
    trained.break_at, trained.breaks = 4, breaks
    try:
        with pytest.warns(UnlearningWarning, match="not finite after 5 steps"):
            result = forget(trained, NegGradPlus(max_steps=50, stop=None), probe_samples=50)
    finally:
        trained.break_at = math.inf
    assert result.candidate is not None
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), trained.parameters(), strict=True))
    assert result.stages[0].steps == 5
