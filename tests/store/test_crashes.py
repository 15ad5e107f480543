"""The process ends at every primitive write, half written files included: the store opens, at the last commit."""

import contextlib
import shutil
from collections import Counter

import pytest
import torch

from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import ModelState, StepStatus
from lightning_unlearn.utilities.parameters import parameter_norm, weights_digest
from tests.helpers.stores import Killed, Killer, Plain, Steps, holds_step, make_store, same_deltas

STEPS = Steps(keys=True)


def content(store):
    """Everything of a store that a reader can see, in a form that can be compared."""
    rows = []
    for step in range(store.n_steps):
        record = store.record(step)
        delta = None
        if record.status is StepStatus.STORED:
            delta = [(name, one.values.tolist()) for name, one in store.read(step).items()]
        rows.append((record.status, tuple(record.sample_ids), record.seconds, delta))
    return rows


def operations():
    """Name and function of everything that changes a store, in the order of a life."""

    def flushed(count):
        def run(store):
            writer = store.writer()
            try:
                STEPS.fill(writer, count)
                writer.flush()
            finally:
                writer.abandon()

        return run

    def truncated(store):
        writer = store.writer()
        try:
            writer.truncate(4)
        finally:
            writer.abandon()

    return [
        ("flush", flushed(3)),
        ("flush again", flushed(3)),
        ("truncate", truncated),
        ("flush after truncation", flushed(2)),
        ("purge", lambda store: store.purge([STEPS[1]["sample_ids"][0]], [1, 4])),
        ("begin", lambda store: store.begin_run("fit", [])),
        ("state", lambda store: store.add_state(ModelState("d", ((0, 5),), (), 1.0, 1.0))),
        ("truncate states", lambda store: store.truncate_states(4)),
    ]


@pytest.mark.parametrize("number", range(len(operations())), ids=[name for name, _ in operations()])
@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_write(tmp_path, monkeypatch, number, torn):
    name, operation = operations()[number]
    seen = Counter()
    for survive in range(40):
        url = tmp_path / str(survive)
        store = make_store(url)
        for _, earlier in operations()[:number]:
            earlier(store)
        store = DeltaStore.open(url)
        before = (content(store), store.lineage)
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn).install(patch)
            try:
                operation(store)
            except Killed:
                assert killer.struck
        reopened = DeltaStore.open(url)
        found = (content(reopened), reopened.lineage)
        assert reopened.verify().ok
        if not killer.struck:
            assert (found != before) or name == "begin"
            seen["after"] += 1
            break
        if found == before:
            seen["before"] += 1
        operation(reopened) if name in {"purge", "begin", "state", "truncate states"} else None
        with DeltaStore.open(url).writer() as writer:
            n_steps = writer.n_steps
            STEPS.fill(writer, 1)
        healed = DeltaStore.open(url)
        assert holds_step(healed, n_steps, STEPS[n_steps])
        report = healed.verify()
        assert report.ok
        assert not [orphan for orphan in report.orphans if orphan.startswith("rank-")]
    assert seen["after"] == 1
    assert seen["before"] >= 1


def test_after_a_crash_the_content_is_that_before_or_after(tmp_path, monkeypatch):
    """The same for one operation, against both contents."""
    contents = []
    operation = operations()[1][1]
    for survive in range(40):
        url = tmp_path / str(survive)
        store = make_store(url)
        operations()[0][1](store)
        with monkeypatch.context() as patch:
            killer = Killer(survive).install(patch)
            with contextlib.suppress(Killed):
                operation(store)
        contents.append(content(DeltaStore.open(url)))
        if not killer.struck:
            break
    before, after = contents[0], contents[-1]
    assert len(before) == 3
    assert len(after) == 6
    assert all(one in (before, after) for one in contents)
    assert contents == sorted(contents, key=len)


def test_a_store_killed_while_it_is_made_can_be_made_again(tmp_path, monkeypatch):
    for survive in range(40):
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn=True).install(patch)
            with contextlib.suppress(Killed):
                make_store(tmp_path / str(survive))
        if DeltaStore.exists(tmp_path / str(survive)):
            store = DeltaStore.open(tmp_path / str(survive))
        else:
            store = make_store(tmp_path / str(survive))
        with store.writer() as writer:
            STEPS.fill(writer, 1)
        store.refresh()
        assert holds_step(store, 0, STEPS[0])
        if not killer.struck:
            break
    else:
        pytest.fail("making a store took more than 40 writes")
    assert survive > 5


def small_segments(url, counts, world_size=1):
    """A store with one segment for each flush, too few to be merged by the way."""
    store = make_store(url, world_size=world_size)
    for rank in range(world_size):
        with store.writer(rank) as writer:
            for count in counts:
                for step in range(writer.n_steps, writer.n_steps + count):
                    mine = [delta for delta in STEPS[step]["deltas"] if delta.layer % world_size == rank]
                    writer.append(**{**STEPS[step], "deltas": mine})
                writer.flush()
    return DeltaStore.open(url)


def flush_one(store):
    writer = store.writer()
    try:
        STEPS.fill(writer, 1)
        writer.flush()
    finally:
        writer.abandon()


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize(
    ("counts", "world_size", "operation", "segments"),
    [
        ([1] * 7, 1, flush_one, 1),  # the eighth small segment makes the writer merge them
        ([2, 1, 3], 1, lambda store: store.compact(), 1),
        ([2, 1, 1], 2, lambda store: store.compact(), 1),
    ],
    ids=["merge behind a flush", "compact", "compact two ranks"],
)
def test_a_merge_that_is_killed_loses_nothing(tmp_path, monkeypatch, counts, world_size, operation, segments, torn):
    small_segments(tmp_path / "whole", counts, world_size)
    before = content(DeltaStore.open(tmp_path / "whole"))
    after = [*before, *([content_of_step(len(before))] if operation is flush_one else [])]
    for survive in range(120):
        url = tmp_path / str(survive)
        shutil.copytree(tmp_path / "whole", url)
        store = DeltaStore.open(url)
        assert len(store.reader.commits[0].segments) == len(counts)
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn).install(patch)
            with contextlib.suppress(Killed):
                operation(store)
        reopened = DeltaStore.open(url)
        assert content(reopened) in (before, after)
        assert reopened.verify().ok
        reopened.compact()
        healed = DeltaStore.open(url)
        assert [len(commit.segments) for commit in healed.reader.commits] == [segments] * world_size
        assert content(healed) == content(reopened)
        assert not [orphan for orphan in healed.verify().orphans if orphan.startswith("rank-")]
        if not killer.struck:
            break
    assert not killer.struck
    assert content(reopened) == after
    assert survive > 15


def content_of_step(step):
    """What `content` gives for a step of `STEPS`, written by one rank."""
    one = STEPS[step]
    delta = [(name, part.values.tolist()) for name, part in zip("abcd", one["deltas"], strict=True)]
    return (StepStatus.STORED, tuple(one["sample_ids"]), one["seconds"], delta)


def test_a_purge_that_is_killed_leaves_no_anchor_that_has_learnt(tmp_path, monkeypatch):
    for survive in range(120):
        url = tmp_path / str(survive)
        store = make_store(url, world_size=2)
        for rank in range(2):
            with store.writer(rank) as writer:
                for step in range(4):
                    # only the first rank knows the id; both keep weights
                    ids = ["asked"] if (rank, step) == (0, 1) else ["other"]
                    deltas = [delta for delta in STEPS[step]["deltas"] if delta.layer % 2 == rank]
                    writer.append(**{**STEPS[step], "deltas": deltas, "sample_ids": ids})
                    if step in (0, 2):
                        writer.anchor(dict(Plain().named_parameters()), None, None)
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn=True).install(patch)
            with contextlib.suppress(Killed):
                DeltaStore.open(url).purge(["asked"])
        reopened = DeltaStore.open(url)
        assert reopened.verify().ok
        # while the id is in a step a second purge finds it, and once it is not, no anchor may hold what it taught
        assert reopened.steps_of(["asked"]).size or reopened.anchors == [1]
        reopened.purge(["asked"])
        reopened.refresh()
        assert reopened.anchors == [1]
        assert reopened.verify().orphans == ()
        if not killer.struck:
            break
    assert not killer.struck
    assert survive > 15


def edited(url):
    """A store whose weights are known, and the module with these weights."""
    store, module = make_store(url, module=Plain()), Plain()
    with store.writer() as writer:
        STEPS.fill(writer, 6)
    store.begin_run("fit", [])
    with torch.no_grad():
        module.a.add_(1.0)
    store.add_state(ModelState(weights_digest(module), ((0, 6),), (), 1.0, parameter_norm(module)))
    return DeltaStore.open(url), module


@pytest.mark.parametrize("action", ["record", "undo", "purge"])
def test_the_ledger_and_the_state_change_together(tmp_path, monkeypatch, action):
    outcomes = []
    for survive in range(60):
        url = tmp_path / str(survive)
        store, module = edited(url)
        ledger = DeletionLedger.open(store)
        asked = STEPS[1]["sample_ids"][0]
        plan = DeletionRequest([asked]).plan(store, module)
        with torch.no_grad():
            module.a.sub_(0.5)
        if action != "record":
            entry = ledger.record(plan, module, method="test")
        weights = [parameter.detach().clone() for parameter in module.parameters()]
        before = DeltaStore.open(url).lineage
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn=True).install(patch)
            try:
                if action == "record":
                    ledger.record(plan, module, method="test")
                elif action == "undo":
                    ledger.undo(entry.entry_id, module)
                else:
                    ledger.purge(entry.entry_id)
            except Killed:
                pass
        reopened = DeltaStore.open(url)
        assert reopened.verify().ok
        lineage = reopened.lineage
        known = lineage.state_of(weights_digest(module))
        if action == "record":
            assert (len(lineage.entries), len(lineage.states)) in {(0, 2), (1, 3)}
            assert (known is not None) == (len(lineage.entries) == 1)
            DeletionLedger.open(reopened)  # a key that was made stays usable
        elif action == "undo":
            assert known is not None
            changed = any(not torch.equal(a, b) for a, b in zip(module.parameters(), weights, strict=True))
            # In memory either all of it happened or nothing, and the store knows the weights in both cases.
            assert changed == (known.edits == ())
            assert lineage.entries[0].undone or not changed
        else:
            assert lineage.entries[0].purged in {"no", "purging", "yes"}
            DeletionLedger.open(reopened).purge(entry.entry_id)  # goes on where it was
            final = DeltaStore.open(url)
            assert final.lineage.entries[0].purged == "yes"
            assert final.steps_of([asked]).size == 0
            for step in range(6):
                touched = step in plan.amounts
                assert (final.record(step).status is StepStatus.PURGED) == touched
                assert touched or same_deltas(final.read(step), STEPS[step]["deltas"])
        outcomes.append(lineage != before)
        if not killer.struck:
            break
    assert outcomes[0] is False
    assert outcomes[-1] is True
    assert survive >= 3


def test_a_purge_over_two_ranks_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    asked = STEPS[1]["sample_ids"][0]
    for survive in range(60):
        url = tmp_path / str(survive)
        store = make_store(url, world_size=2)
        for rank in range(2):
            with store.writer(rank) as writer:
                for step in range(4):
                    mine = [delta for delta in STEPS[step]["deltas"] if delta.layer % 2 == rank]
                    writer.append(**{**STEPS[step], "deltas": mine})
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn=True).install(patch)
            with contextlib.suppress(Killed):
                store.purge([asked], [1])
        reopened = DeltaStore.open(url)
        assert reopened.verify().ok
        reopened.purge([asked], [1])
        assert reopened.verify().orphans == ()
        assert asked not in reopened.reader.distinct_ids()
        assert reopened.record(1).status is StepStatus.PURGED
        assert all(same_deltas(reopened.read(step), STEPS[step]["deltas"]) for step in (0, 2, 3))
        if not killer.struck:
            break
    assert not killer.struck
    assert survive > 15
