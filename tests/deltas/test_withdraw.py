"""A pass taken back leaves the store as it was, but for the note that it was tried; also when that is interrupted."""

import contextlib

import pytest
import torch

from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.deltas.withdraw import withdraw_pass
from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import ModelState
from lightning_unlearn.utilities.parameters import parameter_norm, weights_digest
from tests.helpers.stores import Killed, Killer, Plain, Steps, holds_step, make_store

TRAINED, REPAIRED = 6, 3
STEPS = Steps(keys=True)
ASKED = STEPS[1]["sample_ids"][0]


def append(store, count):
    """The next steps on every rank; each rank records its share of the layers."""
    for rank in range(store.world_size):
        with store.writer(rank) as writer:
            for step in range(writer.n_steps, writer.n_steps + count):
                mine = [one for one in STEPS[step]["deltas"] if one.layer % store.world_size == rank]
                writer.append(**{**STEPS[step], "deltas": mine})


def moved(store, module, ranges, edits=()):
    with torch.no_grad():
        module.a.add_(1.0)
    store.add_state(ModelState(weights_digest(module), ranges, edits, 1.0, parameter_norm(module)))


def trained(url, world_size=1):
    """A store after a fit, and the module it led to."""
    store, module = make_store(url, world_size=world_size), Plain()
    store.begin_run("fit", [])
    append(store, TRAINED)
    moved(store, module, ((0, TRAINED),))
    return DeltaStore.open(url), module


def passed(store, module):
    """An edit and its repair on top; the entry's id."""
    plan = DeletionRequest([ASKED]).plan(store, module)
    with torch.no_grad():
        module.a.sub_(0.5)
    entry = DeletionLedger.open(store).record(plan, module, method="test")
    store.begin_run("repair", [])
    append(store, REPAIRED)
    moved(store, module, ((0, TRAINED + REPAIRED),), (entry.entry_id,))
    return entry.entry_id


def check_withdrawn(url, before, entry_id):
    store = DeltaStore.open(url)
    assert (store.lineage.states, store.lineage.runs) == (before.states, before.runs)
    assert [(entry.entry_id, entry.undone) for entry in store.lineage.entries] == [(entry_id, True)]
    assert store.n_steps == TRAINED
    if store.world_size == 1:
        assert all(holds_step(store, step, STEPS[step]) for step in range(TRAINED))
    report = store.verify()
    assert report.ok
    assert not report.orphans


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_store_is_as_it_was(tmp_path, world_size):
    store, module = trained(tmp_path / "s", world_size)
    before = store.lineage
    original = Plain()
    with torch.no_grad():
        original.a.add_(1.0)
    entry_id = passed(store, module)
    withdraw_pass(store, entry_id=entry_id, n_steps=TRAINED)
    check_withdrawn(tmp_path / "s", before, entry_id)
    assert store.state_of(weights_digest(module)) is None
    plan = DeletionRequest([ASKED]).plan(store, original)
    assert not plan.honoured_ids
    assert set(plan.amounts) == set(store.steps_of([ASKED]).tolist())


def test_a_pass_that_wrote_nothing_changes_no_byte(tmp_path):
    store, _ = trained(tmp_path / "s")
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    withdraw_pass(store, entry_id=None, n_steps=TRAINED)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()} == before


def test_steps_that_only_one_rank_has_committed_are_dropped_as_well(tmp_path):
    store, _ = trained(tmp_path / "s", world_size=2)
    with store.writer(1) as writer:
        writer.append(**{**STEPS[TRAINED], "deltas": []})
    withdraw_pass(store, entry_id=None, n_steps=TRAINED)
    assert [commit.n_steps for commit in DeltaStore.open(tmp_path / "s").reader.commits] == [TRAINED, TRAINED]


def withdraw_here(url, entry_id):
    withdraw_pass(DeltaStore.open(url), entry_id=entry_id, n_steps=TRAINED)


def test_all_processes_of_a_pass_take_it_back_at_once(gloo_pool, tmp_path):
    store, module = trained(tmp_path / "s", 2)
    before = store.lineage
    entry_id = passed(store, module)
    gloo_pool.run(withdraw_here, str(tmp_path / "s"), entry_id)
    check_withdrawn(tmp_path / "s", before, entry_id)


def test_an_open_writer_is_told(tmp_path):
    store, module = trained(tmp_path / "s")
    entry_id = passed(store, module)
    with store.writer(), pytest.raises(StoreMismatchError, match="one writer"):
        withdraw_pass(store, entry_id=entry_id, n_steps=TRAINED)


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_at_every_write(tmp_path, monkeypatch, world_size):
    for survive in range(80):
        url = tmp_path / str(survive)
        store, module = trained(url, world_size)
        before = store.lineage
        entry_id = passed(store, module)
        after = store.lineage
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn=True).install(patch)
            with contextlib.suppress(Killed):
                withdraw_pass(store, entry_id=entry_id, n_steps=TRAINED)
        reopened = DeltaStore.open(url)
        assert reopened.verify().ok
        found = (reopened.lineage.states, reopened.lineage.runs)
        assert found in ((after.states, after.runs), (before.states, before.runs))
        # Whatever the lineage still speaks of can be read.
        assert reopened.n_steps >= max(stop for state in found[0] for _, stop in state.ranges)
        assert reopened.n_steps in (TRAINED, TRAINED + REPAIRED)
        withdraw_pass(reopened, entry_id=entry_id, n_steps=TRAINED)
        for rank in range(world_size):  # what was left of unpublished files goes with the next writer
            reopened.writer(rank).close()
        for temporary in url.glob(".tmp-*"):
            temporary.unlink()
        check_withdrawn(url, before, entry_id)
        if not killer.struck:
            break
    assert not killer.struck
    assert survive > 8 * world_size
