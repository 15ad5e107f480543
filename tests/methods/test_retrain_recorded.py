"""Replaying the batches in a store: the twin of a real run, against plain loops that know the run's batches."""

import copy

import pytest
import torch
from lightning import seed_everything
from torch import nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from lightning_unlearn.api import unlearn
from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.exceptions import MissingRequirementError, StoreMismatchError
from lightning_unlearn.methods import Amnesiac, Retrain
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.models import quiet_trainer
from tests.helpers.recorded import BATCH, EPOCHS, ROWS, XYClassifier, datasets

pytestmark = pytest.mark.filterwarnings("ignore:.*took part in.*:lightning_unlearn.exceptions.UnlearningWarning")
TRAINER = {"max_epochs": EPOCHS, "accelerator": "cpu"}


class Noisy(XYClassifier):
    """Dropout, and a schedule; notes the random state with which each batch is met."""

    def __init__(self, lr=0.05, momentum=0.9):
        super().__init__(lr, momentum)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3))
        self.states = []

    def training_step(self, batch, batch_idx):
        self.states.append(torch.get_rng_state())
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def fit(folder, module, train, seed=7, trainer=None, **recorder):
    seed_everything(seed, verbose=False)
    initial = copy.deepcopy(module)
    settings = {"keep": 1.0, "value_dtype": "float32", **recorder}
    quiet_trainer(max_epochs=EPOCHS, callbacks=[DeltaRecorder(folder, **settings)], **(trainer or {})).fit(
        module, train
    )
    return initial, DeltaStore.open(folder)


def by_hand(module, store, data, forget, *, states=None, schedule=True, per_step=1):
    """The recorded steps without the forgotten samples, in a plain loop; `per_step` batches are one step."""
    module.train()
    configured = module.configure_optimizers()
    optimizer, scheduler = (configured[0][0], configured[1][0]) if isinstance(configured, tuple) else (configured, None)
    per_epoch = store.n_steps // EPOCHS
    x, y = data.tensors
    for step in range(store.n_steps):
        ids = store.record(step).sample_ids
        length = len(ids) if per_step == 1 else BATCH
        batches = [ids[start : start + length] for start in range(0, len(ids), length)]
        kept = [[one for one in batch if one not in forget] for batch in batches]
        optimizer.zero_grad()
        for batch in kept:
            if batch:
                if states is not None:
                    torch.set_rng_state(states[step])
                (functional.cross_entropy(module(x[batch]), y[batch]) / per_step).backward()
        if any(kept):
            optimizer.step()
        if scheduler is not None and (step + 1) % per_epoch == 0:
            scheduler.step()
    return module


def replay(model, store, train, forget, **settings):
    return unlearn(
        model,
        forget,
        method=Retrain(order="recorded"),
        store=store,
        data=train,
        trainer={**TRAINER, **settings},
        probe_samples=0,
        record=False,
    ).model


def assert_same(first, second):
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def loaders(data):
    weights = torch.linspace(1, 3, ROWS)
    variable = BatchSampler(RandomSampler(data), 7, drop_last=True)
    return {
        "shuffled": DataLoader(data, BATCH, shuffle=True),
        "dropping the last": DataLoader(data, 10, shuffle=True, drop_last=True),
        "with repeats": DataLoader(data, BATCH, sampler=WeightedRandomSampler(weights, ROWS)),
        "batch sampler": DataLoader(data, batch_sampler=variable),
    }


@pytest.mark.parametrize("kind", ["shuffled", "dropping the last", "with repeats", "batch sampler"])
def test_whatever_had_shuffled_the_data_the_twin_is_that_of_a_plain_loop(tmp_path, kind):
    data = datasets()[0]
    model = XYClassifier()
    initial, store = fit(tmp_path / "s", model, loaders(data)[kind])
    forget = {3, 17, 40}
    found = replay(model, store, loaders(data)[kind], sorted(forget))
    assert_same(found, by_hand(initial, store, data, forget))
    assert not torch.equal(found.net[0].weight, model.net[0].weight)


def test_with_nothing_in_a_batch_left_there_is_no_step(tmp_path):
    data = datasets()[0]
    model, train = XYClassifier(), DataLoader(data, BATCH)
    initial, store = fit(tmp_path / "s", model, train)
    forget = set(range(BATCH, 2 * BATCH))
    assert_same(replay(model, store, train, sorted(forget)), by_hand(initial, store, data, forget))


@pytest.mark.parametrize("emptied", [9, 0], ids=["in the second epoch", "the first of all"])
def test_dropout_draws_as_it_did(tmp_path, emptied):
    data = datasets()[0]
    model, train = Noisy(), DataLoader(data, BATCH, shuffle=True)
    initial, store = fit(tmp_path / "s", model, train, anchor_every=1)
    states = model.states
    model.states = []
    forget = {*store.record(emptied).sample_ids, 5}  # one batch is left empty
    found = replay(model, store, train, sorted(forget))
    # The state of the first step that is made is nobody's: it was drawn before it.
    first = 1 + (emptied == 0)
    twin = by_hand(initial, store, data, forget, states=[found.states[0]] * first + states[first:])
    assert_same(found, twin)


def test_accumulated_batches_are_cut_where_they_were(tmp_path):
    data = datasets()[0]
    model, train = XYClassifier(), DataLoader(data, BATCH, shuffle=True)
    initial, store = fit(tmp_path / "s", model, train, trainer={"accumulate_grad_batches": 2})
    forget = {1, 30}
    found = replay(model, store, train, sorted(forget), accumulate_grad_batches=2)
    assert_same(found, by_hand(initial, store, data, forget, per_step=2))


def test_what_cannot_be_replayed_is_refused(tmp_path):
    data = datasets()[0]
    model, train = XYClassifier(), DataLoader(data, BATCH, shuffle=True)
    _, store = fit(tmp_path / "s", model, train)
    with pytest.raises(StoreMismatchError, match=f"Pass max_epochs={EPOCHS}"):
        replay(model, store, train, [3], max_epochs=EPOCHS + 1)
    with pytest.raises(MissingRequirementError, match="store"):
        unlearn(model, [3], method=Retrain(order="recorded"), data=train, trainer=TRAINER, probe_samples=0)
    edited = unlearn(model, [3], method=Amnesiac(), store=store, data=train, probe_samples=0, force=True).model
    with pytest.raises(StoreMismatchError, match="rest on a subtraction"):
        replay(edited, store, train, [4])
    other = copy.deepcopy(model)
    other.net[0].weight.data += 1
    with pytest.raises(StoreMismatchError, match="other weights"):
        replay(other, store, train, [4])


def test_a_key_of_several_rows_says_nothing_about_batches(tmp_path):
    data = TensorDataset(*datasets()[0].tensors)
    keys = [f"user-{row // 2}" for row in range(ROWS)]
    model, train = XYClassifier(), DataLoader(data, BATCH, shuffle=True)
    _, store = fit(tmp_path / "s", model, train, sample_keys=keys)
    with pytest.raises(StoreMismatchError, match="several rows of 'user-"):
        unlearn(
            model,
            ["user-3"],
            method=Retrain(order="recorded"),
            store=store,
            data=train,
            sample_keys=keys,
            trainer=TRAINER,
            probe_samples=0,
        )
