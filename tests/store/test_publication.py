"""Publication beside the training: what it costs, what it bounds, and what its failures leave."""

import json
import math
import subprocess
import sys
import threading
import uuid
import warnings

import pytest
import torch

from lightning_unlearn.exceptions import StoreMismatchError, UnlearningWarning
from lightning_unlearn.store.codec import encode_layer, relative_rounding_error
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import LayerDelta
from lightning_unlearn.utilities.files import Files
from tests.helpers.stores import SIZES, Killed, Killer, Steps, holds_step, make_store


class Gate:
    """Holds every write of a segment back until it is opened."""

    def __init__(self, monkeypatch):
        self.open, self.reached, self.writes = threading.Event(), threading.Event(), 0
        real = Files.perform

        def perform(files, primitive, *args):
            if primitive.__name__ == "_write_synced" and "segment" in args[0]:
                self.writes += 1
                self.reached.set()
                assert self.open.wait(20)
            real(files, primitive, *args)

        monkeypatch.setattr(Files, "perform", perform)


@pytest.mark.parametrize("background", ["auto", True])
def test_training_goes_on_while_a_segment_is_written(tmp_path, monkeypatch, background):
    store, steps, gate = make_store(tmp_path / "s"), Steps(keep=1.0), Gate(monkeypatch)
    writer = store.writer(background=background, segment_bytes=4000)  # three steps
    steps.fill(writer, 3)
    assert gate.reached.wait(20)
    steps.fill(writer, 2)  # does not wait for the write
    assert gate.writes == 1
    store.refresh()
    assert store.n_steps == 0  # and nothing is there before it is complete
    third = threading.Thread(target=steps.fill, args=(writer, 8))
    third.start()
    third.join(0.2)
    assert third.is_alive()  # two sets of records are in memory: the third one waits
    assert gate.writes == 1
    gate.open.set()
    third.join(20)
    writer.close()
    store.refresh()
    assert store.n_steps == 13
    assert all(holds_step(store, step, steps[step]) for step in range(13))


@pytest.mark.parametrize("background", [False, "auto", True])
def test_flush_truncate_and_close_wait(tmp_path, background):
    store, steps = make_store(tmp_path / "s"), Steps(keep=1.0)
    writer = store.writer(background=background, segment_bytes=4000)
    for call, n_steps in ((writer.flush, 7), (lambda: writer.truncate(5), 5), (writer.close, 12)):
        steps.fill(writer, 7)
        call()
        store.refresh()
        assert store.n_steps == n_steps
    assert all(holds_step(store, step, steps[step]) for step in range(12))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("store-")]


@pytest.mark.parametrize("survive", range(6))
def test_a_failed_publication_stops_the_recording_and_nothing_else(tmp_path, monkeypatch, survive):
    store, steps = make_store(tmp_path / "s"), Steps(keep=1.0)
    writer = store.writer(segment_bytes=4000)
    steps.fill(writer, 3)
    writer.flush()
    with monkeypatch.context() as patch:
        killer = Killer(survive, torn=True).install(patch)
        with pytest.raises(Killed):  # the thread fails during one of these, and a later one says so
            steps.fill(writer, 100)
        count = killer.count
        for call in (lambda: steps.fill(writer, 1), writer.flush, lambda: writer.truncate(1), writer.close):
            with pytest.raises(Killed):
                call()
        assert killer.count == count  # nothing was tried behind it
    healed = DeltaStore.open(store.url)
    assert healed.verify().ok
    assert healed.n_steps in (3, 6)
    with healed.writer() as again:
        steps.fill(again, 2)
    healed.refresh()
    assert all(holds_step(healed, step, steps[step]) for step in range(healed.n_steps))
    assert not healed.verify().orphans


@pytest.mark.parametrize("background", [False, "auto", True])
def test_what_is_on_its_way_is_called_where_it_is_encoded_in_order(tmp_path, background):
    store, steps, calls = make_store(tmp_path / "s", value_dtype="int8"), Steps(), []
    with store.writer(background=background) as writer:
        for step in range(5):

            def deltas(step=step):
                calls.append((step, threading.current_thread().name))
                return steps[step]["deltas"]

            given = {"pruning_error": lambda: 0.25, "edited": lambda: True} if step == 2 else {}
            writer.append(**{**steps[step], "deltas": deltas, **given})
    name = "store-writer" if background is True else threading.current_thread().name
    assert calls == [(step, name) for step in range(5)]
    store.refresh()
    records = [store.record(step) for step in range(5)]
    assert [record.edited for record in records] == [False, False, True, False, False]
    assert [math.isnan(record.pruning_error) for record in records] == [True, True, False, True, True]
    assert [math.isnan(record.rounding_error) for record in records] == [True, True, False, True, True]
    pairs = [(delta, encode_layer(delta, SIZES[delta.layer], "int8")) for delta in steps[2]["deltas"]]
    assert records[2].pruning_error == 0.25
    assert records[2].rounding_error == pytest.approx(relative_rounding_error(pairs), rel=1e-6)
    assert records[2].rounding_error > 1e-4


def append_and_flush(writer, deltas):
    writer.append(**{**Steps()[1], "deltas": deltas})
    writer.flush()


@pytest.mark.parametrize("background", ["auto", True])
def test_an_error_of_what_is_on_its_way_reaches_the_training(tmp_path, background):
    def lost():
        raise RuntimeError("the device is gone")

    store = make_store(tmp_path / "s")
    writer = store.writer(background=background)
    Steps().fill(writer, 1)
    with pytest.raises(RuntimeError, match="the device is gone"):
        append_and_flush(writer, lost)
    if background is True:
        with pytest.raises(RuntimeError, match="the device is gone"):
            writer.append(**Steps()[1])
    writer.abandon()
    store.refresh()
    assert store.verify().ok


@pytest.mark.parametrize("background", ["auto", True])
def test_layers_that_arrive_later_are_checked_as_well(tmp_path, background):
    writer = make_store(tmp_path / "s").writer(background=background)
    with pytest.raises(ValueError, match="layer"):
        append_and_flush(writer, lambda: [LayerDelta(9, None, torch.ones(1))])
    writer.abandon()


def test_however_often_it_is_flushed_there_are_few_segments(tmp_path):
    store, steps = make_store(tmp_path / "s"), Steps()
    counts, sizes = [], []
    with store.writer() as writer:
        for _ in range(400):
            steps.fill(writer, 1)
            writer.flush()
            folder = tmp_path / "s" / "rank-00000"
            (commit,) = folder.glob("commit-*.json")
            counts.append(len(json.loads(commit.read_text())["body"]["segments"]))
            sizes.append(commit.stat().st_size)
    # at most 7 of a size, and the sizes grow by a factor: not one for each of 400 flushes
    assert max(counts) <= 24
    assert max(sizes[200:]) <= 2 * max(sizes[:100])
    reopened = DeltaStore.open(store.url)
    assert reopened.n_steps == 400
    assert all(holds_step(reopened, step, steps[step]) for step in range(400))
    report = reopened.verify()
    assert report.ok
    assert not report.orphans


def test_merging_never_exceeds_the_segment_size(tmp_path):
    store, steps = make_store(tmp_path / "s"), Steps()
    with store.writer(segment_bytes=30_000) as writer:
        for _ in range(60):
            steps.fill(writer, 1)
            writer.flush()
    store.refresh()
    refs = store.reader.commits[0].segments
    assert max(ref.bytes for ref in refs) <= 30_000
    assert any(ref.stop - ref.start > 1 for ref in refs)


def test_a_damaged_older_segment_ends_the_merging_and_not_the_recording(tmp_path):
    store, steps = make_store(tmp_path / "s"), Steps()
    writer = store.writer(background=False)
    for _ in range(7):
        steps.fill(writer, 1)
        writer.flush()
    victim = sorted((tmp_path / "s" / "rank-00000").glob("segment-*"))[0]
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    steps.fill(writer, 1)
    with pytest.warns(UnlearningWarning, match="no longer merged"):
        writer.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            steps.fill(writer, 1)
            writer.flush()
        writer.close()
    healed = DeltaStore.open(store.url)
    assert [damage.steps for damage in healed.verify().damages] == [(0,)]
    healed.repair()
    assert all(holds_step(healed, step, steps[step]) for step in range(1, 17))


def test_a_crash_at_every_primitive_of_publishing_and_merging(tmp_path, monkeypatch):
    """In the thread: whatever was flushed before is there, each step once, and the next writer goes on."""
    steps = Steps()
    outcomes = set()
    for survive in range(80):
        store = make_store(tmp_path / str(survive))
        writer = store.writer()
        for _ in range(7):
            steps.fill(writer, 1)
            writer.flush()
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn=True).install(patch)
            steps.fill(writer, 1)  # the eighth makes a run that is merged
            try:
                writer.flush()
            except Killed:
                assert killer.struck
            writer.abandon()
        healed = DeltaStore.open(store.url)
        assert healed.verify().ok
        assert healed.n_steps in (7, 8)
        assert all(holds_step(healed, step, steps[step]) for step in range(healed.n_steps))
        outcomes.add((healed.n_steps, len(healed.reader.commits[0].segments)))
        with healed.writer() as again:
            steps.fill(again, 1)
        healed.refresh()
        assert healed.verify().ok
        assert not healed.verify().orphans
        if not killer.struck:
            break
    assert not killer.struck
    assert survive > 15
    assert outcomes == {(7, 7), (8, 8), (8, 1)}


HOLDER = """
import sys
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.stores import Steps
writer = DeltaStore.open(sys.argv[1]).writer()
Steps().fill(writer, 2)
print("held", flush=True)
sys.stdin.readline()
writer.close()
"""


def test_two_processes(tmp_path):
    store = make_store(tmp_path / "s")
    command = [sys.executable, "-c", HOLDER, store.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:  # noqa: S603
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreMismatchError, match="another writer"):
            store.writer()
        other.stdin.write("go on\n")
        other.stdin.flush()
        assert other.wait(60) == 0
    store.refresh()
    assert store.n_steps == 2
    with store.writer() as writer:
        Steps().fill(writer, 1)


def record_at_once(url, seed, ready, errors):
    ready.wait(20)
    try:
        with DeltaStore.open(url).writer(segment_bytes=1500) as writer:
            Steps(seed=seed).fill(writer, 8)
    except Exception as error:
        errors.append(error)


def test_many_threads_at_once_where_nothing_can_be_locked():
    """Whatever the interleaving: each error is a typed one, and every step is one that a writer wrote."""
    for _ in range(6):
        store = make_store(f"memory://{uuid.uuid4().hex}")
        errors, ready = [], threading.Barrier(4)
        threads = [threading.Thread(target=record_at_once, args=(store.url, seed, ready, errors)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert all(isinstance(error, StoreMismatchError) for error in errors), errors
        store.refresh()
        assert store.verify().ok
        for step in range(store.n_steps):
            assert any(holds_step(store, step, Steps(seed=seed)[step]) for seed in range(4))
