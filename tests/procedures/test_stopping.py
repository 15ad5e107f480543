"""Passes that end before their limits: by held-out data, and by a loss that broke."""

import copy
import math
import warnings

import pytest
import torch
from lightning import LightningDataModule, LightningModule, seed_everything
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_unlearn.api import unlearn
from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.exceptions import NoEffectWarning, UnlearningWarning, UnsupportedStrategyError
from lightning_unlearn.methods import GradientAscent, NegGradPlus, PartialAmnesiac
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.parameters import weights_digest
from tests.helpers.models import quiet_trainer
from tests.helpers.recorded import datasets, record
from tests.helpers.recorded import loaders as recorded_loaders

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
    reached, held_out = loss(result.model, TRAIN, FORGET), loss(trained, VAL)
    assert reached >= held_out
    (note,) = [one for one in result.notes if "was ended" in one]
    assert f"after {stage.steps} steps" in note
    assert f"({reached:.3f})" in note
    # one look earlier it had not got there
    shorter = type(method)(**{**method.settings, "max_steps": stage.steps - method.check_every, "stop": None})
    assert loss(forget(trained, shorter).model, TRAIN, FORGET) < held_out


def test_what_was_never_learnt_is_not_pushed_at_all(trained):
    model = Memorises()
    with pytest.warns(NoEffectWarning, match="changed no weight"):
        result = forget(model, GradientAscent(max_steps=30), force=True)
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), model.parameters(), strict=True))
    assert result.stages[0].steps == 0
    assert any("before the first step" in note for note in result.notes)
    assert any('say `stop="retain"`' in note for note in result.notes)


def test_wrong_labels_that_were_not_learnt_are_pushed_though_their_loss_is_above(trained):
    seed_everything(0, verbose=False)
    model = Memorises(lr=0.02)
    quiet_trainer(max_epochs=15).fit(model, loaders()["train"])
    assert loss(model, TRAIN, FORGET) > 2 * loss(model, VAL)
    result = forget(model, NegGradPlus(max_steps=6))
    assert result.stages[0].steps == 6
    assert loss(result.model, TRAIN, FORGET) > loss(model, TRAIN, FORGET)
    assert any("no target for NegGradPlus" in note and "above it" in note for note in result.notes)


def held(model):
    """The losses on retain data and on held-out data."""
    return loss(model, TRAIN, range(12, 96)), loss(model, VAL)


def test_a_step_that_damages_the_model_is_taken_back(trained):
    retain, held_out = held(trained)
    limits = retain + 0.5 * (held_out - retain), 1.5 * held_out
    result = forget(trained, NegGradPlus(max_steps=400, stop="retain"))
    last = result.stages[0].steps
    assert 5 < last < 400
    assert all(now <= limit for now, limit in zip(held(result.model), limits, strict=True))
    (note,) = [one for one in result.notes if "taken back" in one]
    assert f"by step {last}" in note
    # bit for bit the pass that is one step shorter; that step crosses a limit
    shorter = forget(trained, NegGradPlus(max_steps=last - 1, stop=None)).model
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), shorter.parameters(), strict=True))
    whole = forget(trained, NegGradPlus(max_steps=last, stop=None)).model
    assert any(now > limit for now, limit in zip(held(whole), limits, strict=True))


def test_a_first_step_that_is_too_long_is_tried_again_with_half_the_rate(trained):
    given = NegGradPlus(max_steps=6, stop="retain", lr_scale=3000.0)
    result = forget(trained, given)
    (note,) = [one for one in result.notes if "halved" in one]
    times = int(note.split("halved ")[1].split()[0])
    assert 1 <= times < 5
    assert any(not torch.equal(a, b) for a, b in zip(result.model.parameters(), trained.parameters(), strict=True))
    retain, held_out = held(trained)
    now = held(result.model)
    assert now[0] <= retain + 0.5 * (held_out - retain)
    assert now[1] <= 1.5 * held_out


def test_a_rate_that_no_halving_mends_changes_nothing(trained):
    with pytest.warns(NoEffectWarning, match="changed no weight"):
        result = forget(trained, NegGradPlus(max_steps=20, stop="retain", lr_scale=1e9))
    assert result.stages[0].steps == 6
    assert any("halved 5 times" in note for note in result.notes)
    assert any("ended by step 6" in note for note in result.notes)


def test_looking_less_often_takes_back_more(trained):
    result = forget(trained, NegGradPlus(max_steps=400, stop="retain", check_every=7))
    assert result.stages[0].steps % 7 == 0
    shorter = forget(trained, NegGradPlus(max_steps=result.stages[0].steps - 7, stop=None)).model
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), shorter.parameters(), strict=True))


def test_a_recorder_sees_what_was_taken_back(tmp_path):
    recorded = record(tmp_path, epochs=6)
    before = recorded.store.n_steps
    data = {"train": recorded_loaders()["train"], "val": DataLoader(datasets()[1], 64)}
    method = NegGradPlus(max_steps=300, retain_weight=0.3, stop="retain")
    result = forget(recorded.model, method, data=data, store=recorded.url)
    assert any("taken back" in note for note in result.notes)
    store = recorded.store
    state = store.state_of(weights_digest(result.model))
    assert state is not None
    assert not state.drifted
    change = accumulate(store, dict.fromkeys(range(before, store.n_steps), 1.0))
    old = dict(recorded.model.named_parameters())
    for name, parameter in result.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(old[name] + change[name], parameter.double(), rtol=0, atol=1e-5)
    last = store.read(store.n_steps - 1)
    assert all(not delta.dense().any() for delta in last.values())


def test_several_steps_taken_back_at_once_are_not_recorded(tmp_path):
    recorded = record(tmp_path)
    before = recorded.store.n_steps
    data = {"train": recorded_loaders()["train"], "val": DataLoader(datasets()[1], 64)}
    with pytest.warns(UnlearningWarning, match="not recorded: with `check_every` above 1"):
        forget(recorded.model, NegGradPlus(max_steps=4, check_every=2, stop="retain"), data=data, store=recorded.url)
    assert recorded.store.n_steps == before


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


@pytest.mark.parametrize("limit", ["min_steps", "min_epochs"])
@pytest.mark.parametrize("breaks", [False, True])
def test_no_lower_limit_of_the_trainer_goes_on_after_the_end(trained, limit, breaks):
    def trainer(**arguments):
        return quiet_trainer(**{limit: 300, "max_epochs": -1, **arguments})

    model = copy.deepcopy(trained)
    model.break_at = 2 if breaks else math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnlearningWarning)
        result = forget(model, NegGradPlus(max_steps=400), trainer=trainer)
    (note,) = [one for one in result.notes if "ended" in one]
    assert f"after {result.stages[0].steps} steps" in note
    assert result.stages[0].steps < 300


class Validated(LightningDataModule):
    def __init__(self, validation):
        super().__init__()
        self.validation = validation

    def train_dataloader(self):
        return loaders()["train"]

    def val_dataloader(self):
        return self.validation


class Endless(IterableDataset):
    def __iter__(self):
        return iter(VAL)


@pytest.mark.parametrize(
    "validation",
    [[DataLoader(VAL), DataLoader(VAL)], {"a": DataLoader(VAL)}, DataLoader(Endless())],
    ids=["list", "dict", "iterable"],
)
@pytest.mark.filterwarnings("ignore::lightning_unlearn.exceptions.UnlearningWarning")
def test_validation_data_that_cannot_be_looked_at_are_refused_before_the_edit(validation, tmp_path):
    recorded, data = record(tmp_path, epochs=1), Validated(validation)
    data.train_dataloader = lambda: recorded_loaders()["train"]
    settings = {"data": data, "store": recorded.url, "force": True, "probe_samples": 0}
    with pytest.raises(UnsupportedStrategyError, match=r"NegGradPlus looks at validation.*val_dataloader.*stop=None"):
        unlearn(recorded.model, [3], method=PartialAmnesiac(), then=NegGradPlus(max_steps=2), **settings)
    assert not DeletionLedger.open(DeltaStore.open(recorded.url)).entries
    assert forget(recorded.model, NegGradPlus(max_steps=2, stop=None), data=data).stages[0].steps == 2


def test_empty_validation_data_are_none(trained):
    with pytest.warns(UnlearningWarning, match="no validation data"):
        result = forget(trained, NegGradPlus(max_steps=2), data=Validated(DataLoader(Subset(VAL, []))))
    assert result.stages[0].steps == 2


def test_a_buffer_that_is_assigned_anew_is_taken_back(trained):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + self.training
            return x

    model = copy.deepcopy(trained)
    model.net.insert(0, Counting())
    result = forget(model, NegGradPlus(max_steps=400, stop="retain"))
    assert "taken back" in "".join(result.notes)
    # two parts a step, and the last step is none
    assert float(result.model.net[0].count) == 2 * (result.stages[0].steps - 1)
