"""The ledger on weights that a real Trainer trained and a real recorder recorded."""

import copy
import os
import stat
from pathlib import Path

import pytest
import torch

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import DeletionRequestError, MissingDeltaError, StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import StepStatus
from lightning_unlearn.utilities.parameters import apply_change
from tests.helpers.models import quiet_trainer
from tests.helpers.recorded import loaders, record

FIRST, SECOND = [3, 17, 40], [5, 21]


@pytest.fixture
def trained(tmp_path):
    return record(tmp_path)


def forget(store, module, ids, *, scale="step", keep=None, key=None):
    """Subtract and write the ledger, without guards and repairs; skips what is forgotten already."""
    ledger = DeletionLedger.open(store, key)
    plan = DeletionRequest(ids).plan(store, module, scale=scale, keep=keep, ledger=ledger)
    if plan.honoured_ids:
        plan = plan.request.without(plan.honoured_ids).plan(store, module, scale=scale, keep=keep, ledger=ledger)
    apply_change(module, accumulate(store, plan.amounts, keep=keep), scale=-1.0)
    return plan, ledger.record(plan, module, method="test")


def difference(*modules):
    """Largest difference between the first two, relative to the largest weight of all."""
    one, other = (list(module.parameters()) for module in modules[:2])
    largest = max(float(p.detach().abs().max()) for module in modules for p in module.parameters())
    return max(float((a - b).detach().abs().max()) for a, b in zip(one, other, strict=True)) / largest


ROUNDING = 2.0**-24
"""Of a float32 weight, relative: each edit of the weights rounds once."""


@pytest.mark.parametrize("scale", ["step", "share"])
@pytest.mark.parametrize("keep", [None, 0.1])
@pytest.mark.parametrize("overlap", [[], FIRST[:2]], ids=["disjoint", "overlapping"])
def test_two_requests_equal_their_union(trained, scale, keep, overlap):
    store = trained.store
    # companions of the first ones, so that both requests want the same steps
    second = [*sorted(store.ids_in(store.steps_of(FIRST[:1])) - set(FIRST))[:3], *overlap]
    one, both = copy.deepcopy(trained.model), copy.deepcopy(trained.model)
    forget(store, one, FIRST, scale=scale, keep=keep)
    middle = copy.deepcopy(one)
    plan, entry = forget(store, one, second, scale=scale, keep=keep)
    assert set(plan.request.sample_ids) == set(second) - set(FIRST)
    edits = store.state_of(entry.after).edits
    assert edits == (*plan.state.edits, entry.entry_id)
    assert len(edits) == 2
    shared = set(plan.steps.tolist()) & set(store.steps_of(FIRST).tolist())
    assert len(shared) >= 2
    assert shared <= set(plan.amounts) if scale == "share" else not shared & set(plan.amounts)
    union, _ = forget(store, both, sorted({*FIRST, *second}), scale=scale, keep=keep)
    total = DeletionLedger.open(store).subtracted(edits)
    assert total == pytest.approx(dict(union.amounts), rel=1e-14)
    assert difference(one, both, middle, trained.model) <= 3 * ROUNDING
    assert difference(one, trained.model) > 1e-3


def test_a_step_is_never_subtracted_twice(trained):
    store, module = trained.store, copy.deepcopy(trained.model)
    edits = []
    for number, ids in enumerate([[3], [17], [40], [5]]):
        _, entry = forget(store, module, ids, scale="share" if number % 2 else "step")
        edits.append(entry.entry_id)
        assert all(0 < amount <= 1 for amount in DeletionLedger.open(store).subtracted(edits).values())


def test_honoured_is_told_for_these_weights_only(trained):
    store, module = trained.store, copy.deepcopy(trained.model)
    _, entry = forget(store, module, FIRST)
    plan = DeletionRequest([3, 5]).plan(store, module)
    assert dict(plan.honoured_ids) == {3: entry.entry_id}
    with pytest.raises(DeletionRequestError, match=entry.entry_id):
        plan.check(force=True)
    assert not DeletionRequest([3, 5]).plan(store, trained.model).honoured_ids
    assert DeletionRequest(["3"]).plan(store, module).unknown_ids == ("3",)


@pytest.mark.parametrize("scale", ["step", "share"])
def test_undo(trained, scale):
    store, module = trained.store, copy.deepcopy(trained.model)
    _, first = forget(store, module, FIRST, scale=scale)
    middle = copy.deepcopy(module)
    _, second = forget(store, module, SECOND, scale=scale)
    edited = copy.deepcopy(module)
    ledger = DeletionLedger.open(store)
    with pytest.raises(DeletionRequestError, match="latest edit"):
        ledger.undo(first.entry_id, module)
    ledger.undo(second.entry_id, module)
    assert difference(module, middle, edited) <= 2 * ROUNDING
    state = ledger.undo(first.entry_id, module)
    assert difference(module, trained.model, edited) <= 4 * ROUNDING
    assert state.edits == ()
    assert all(entry.undone for entry in ledger.entries)
    again = DeletionRequest(FIRST).plan(store, module, scale=scale)
    assert not again.honoured_ids
    assert len(again.amounts) == len(first.amounts)


def test_undo_of_strange_weights_or_entries(trained):
    store, module = trained.store, copy.deepcopy(trained.model)
    _, entry = forget(store, module, FIRST)
    ledger = DeletionLedger.open(store)
    with pytest.raises(DeletionRequestError, match="an entry of this ledger"):
        ledger.undo("nothing", module)
    with pytest.raises(DeletionRequestError, match="latest edit"):
        ledger.undo(entry.entry_id, trained.model)
    with torch.no_grad():
        next(module.parameters()).add_(1.0)
    with pytest.raises(StoreMismatchError, match="knows"):
        ledger.undo(entry.entry_id, module)


def test_purge(trained):
    store, module = trained.store, copy.deepcopy(trained.model)
    touched = store.steps_of(FIRST).tolist()
    others = store.ids_in(touched) - set(FIRST)
    _, entry = forget(store, module, FIRST)
    edited = copy.deepcopy(module)
    ledger = DeletionLedger.open(store)
    ledger.purge(entry.entry_id)
    ledger.purge(entry.entry_id)
    fresh = DeltaStore.open(store.url)
    assert fresh.steps_of(FIRST).size == 0
    assert fresh.ids_in(touched) == others
    assert {s for s in range(fresh.n_steps) if fresh.record(s).status is StepStatus.PURGED} == set(touched)
    assert fresh.lineage.entries[0].purged == "yes"
    assert fresh.verify().ok
    # forgotten and unknown can still be told apart
    plan = DeletionRequest([3, 999]).plan(fresh, module)
    assert dict(plan.honoured_ids) == {3: entry.entry_id}
    assert plan.unknown_ids == (999,)
    with pytest.raises(MissingDeltaError, match="purged"):
        DeletionLedger.open(fresh).undo(entry.entry_id, module)
    assert difference(module, edited) == 0.0
    # others in the same steps can still be forgotten: these steps are subtracted already
    innocent = sorted(others)[0]
    following = DeletionRequest([innocent]).plan(fresh, module)
    assert set(following.steps.tolist()) & set(touched)
    assert not following.missing_steps
    # in the weights before the edit they cannot
    assert DeletionRequest([innocent]).plan(fresh, trained.model).missing_steps


def test_purge_keeps_deltas_of_which_only_a_share_is_gone(trained):
    store, module = trained.store, copy.deepcopy(trained.model)
    _, first = forget(store, module, FIRST, scale="share")
    DeletionLedger.open(store).purge(first.entry_id)
    assert set(store.statuses(range(store.n_steps)).tolist()) == {StepStatus.STORED}
    assert store.steps_of(FIRST).size == 0
    step = next(iter(first.amounts))
    rest = sorted(set(store.record(step).sample_ids))
    _, second = forget(store, module, rest, scale="step")
    DeletionLedger.open(store).purge(second.entry_id)
    assert store.record(step).status is StepStatus.PURGED  # the two shares together are the whole step


def train_on(recorded, module):
    """One more recorded epoch on everything, forgotten samples included."""
    recorder = DeltaRecorder(recorded.url, 1.0, value_dtype="float32")
    quiet_trainer(max_epochs=1, callbacks=[recorder]).fit(module, loaders()["train"])
    return DeltaStore.open(recorded.url)


@pytest.mark.parametrize("scale", ["step", "share"])
def test_what_a_later_fit_learnt_again_can_be_forgotten_again(trained, scale):
    module = copy.deepcopy(trained.model)
    _, first = forget(trained.store, module, FIRST, scale=scale)
    n_steps = trained.store.n_steps
    store = train_on(trained, module)
    plan = DeletionRequest([*FIRST, 5]).plan(store, module, scale=scale)
    assert not plan.honoured_ids
    assert not plan.unknown_ids
    # of the ids learnt again only the new steps, of the other one all that the first edit left of its steps
    expected = {}
    for step in range(store.n_steps):
        ids = store.record(step).sample_ids
        asked = {5} if step < n_steps else {*FIRST, 5}
        if count := sum(one in asked for one in ids):
            left = 1.0 - first.amounts.get(step, 0.0)
            expected[step] = min(count / len(ids) if scale == "share" else 1.0, left)
    assert dict(plan.amounts) == pytest.approx({step: amount for step, amount in expected.items() if amount})
    plan.check(force=True)
    _, second = forget(store, module, [*FIRST, 5], scale=scale)
    assert dict(DeletionRequest([3, 5]).plan(store, module).honoured_ids) == dict.fromkeys([3, 5], second.entry_id)


def test_ids_that_were_learnt_again_are_not_purged(trained):
    module = copy.deepcopy(trained.model)
    _, first = forget(trained.store, module, FIRST)
    store = train_on(trained, module)
    with pytest.raises(DeletionRequestError, match=r"trained on again: 17, 3, 40'\. Forget"):
        DeletionLedger.open(store).purge(first.entry_id)
    assert store.lineage.entries[0].purged == "no"
    assert store.unseen(FIRST) == []
    _, second = forget(store, module, FIRST)
    for entry in (first, second):
        DeletionLedger.open(store).purge(entry.entry_id)
    assert store.unseen(FIRST) == FIRST
    assert set(DeletionRequest(FIRST).plan(store, module).honoured_ids) == set(FIRST)


def test_an_undone_entry_has_nothing_to_purge(trained):
    store, module = trained.store, copy.deepcopy(trained.model)
    _, entry = forget(store, module, FIRST)
    ledger = DeletionLedger.open(store)
    ledger.undo(entry.entry_id, module)
    with pytest.raises(DeletionRequestError, match="undone"):
        ledger.purge(entry.entry_id)


def test_the_key(trained):
    store, module = trained.store, copy.deepcopy(trained.model)
    path = Path(trained.url + ".ledger-key")
    DeletionLedger.open(store)
    assert not path.exists()
    _, entry = forget(store, module, FIRST)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    secret = path.read_bytes()
    assert all(secret not in file.read_bytes() for file in Path(trained.url).rglob("*") if file.is_file())
    assert len(entry.id_hashes) == 3
    assert {len(hashed) for hashed in entry.id_hashes} == {32}
    with pytest.raises(StoreMismatchError, match="another"):
        DeletionLedger.open(store, b"x" * 32)
    path.rename(trained.url + ".elsewhere")
    with pytest.raises(StoreMismatchError, match="no key"):
        DeletionLedger.open(DeltaStore.open(trained.url))
    assert DeletionLedger.open(store, secret).honoured([3], [entry.entry_id])


def test_a_key_of_ones_own(trained):
    store, module = trained.store, copy.deepcopy(trained.model)
    forget(store, module, FIRST, key=b"k" * 16)
    assert not Path(trained.url + ".ledger-key").exists()
    assert DeletionLedger.open(store, b"k" * 16).entries
    with pytest.raises(StoreMismatchError, match="no key"):
        DeletionLedger.open(store)


def test_record_checks_what_it_is_told(trained):
    store, module = trained.store, copy.deepcopy(trained.model)
    ledger = DeletionLedger.open(store)
    plan = DeletionRequest(FIRST).plan(store, module, keep=0.5)
    with pytest.raises(ValueError, match=r"plan's 0\.5"):
        ledger.record(plan, module, method="test", keep=0.1)
    with pytest.raises(StoreMismatchError, match="without"):
        ledger.record(DeletionRequest(FIRST).plan(None), module, method="test")
    assert not ledger.entries
    entry = ledger.record(plan, module, method="other", keep=0.5, amounts={})
    assert (entry.method, entry.keep, dict(entry.amounts)) == ("other", 0.5, {})
    assert ledger.subtracted([entry.entry_id]) == {}


def test_pruned_undo_adds_the_pruned_sum_back(trained):
    store, module = trained.store, copy.deepcopy(trained.model)
    keep = {"net.0.*": 0.2, "*": 0.7}
    _, entry = forget(store, module, FIRST, keep=keep)
    edited = copy.deepcopy(module)
    assert difference(module, trained.model) > 1e-3
    again = DeltaStore.open(store.url)
    assert list(again.lineage.entries[0].keep.items()) == list(keep.items())
    DeletionLedger.open(again).undo(entry.entry_id, module)
    assert difference(module, trained.model, edited) <= 2 * ROUNDING
