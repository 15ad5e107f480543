import gc
import os
import pickle
import tracemalloc
import uuid

import numpy as np
import pytest
import torch

from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.documents import FORMAT_VERSION
from lightning_unlearn.store.opening import Views, open_segment, whole_file
from lightning_unlearn.types import LayerDelta
from lightning_unlearn.utilities.files import Files
from tests.helpers.stores import Steps, holds_step, make_store

STEPS = Steps(keys=True)


def open_files():
    return len(os.listdir("/proc/self/fd"))


def recorded(url, count=6, flushes=1):
    store = make_store(url)
    for _ in range(flushes):
        with store.writer() as writer:
            STEPS.fill(writer, count)
    store.refresh()
    return store


def test_a_limited_number_of_files_is_open_at_a_time(tmp_path):
    files = Files(tmp_path)
    for number in range(150):
        files.publish(f"{number}", bytes([number]))
    views, before = Views(files), open_files()
    for _ in range(2):
        for number in range(150):
            assert bytes(views.read(f"{number}", 0, 1)) == bytes([number])
            assert open_files() - before <= 66


def test_no_file_stays_open_behind_a_store(tmp_path):
    recorded(tmp_path / "s")
    gc.collect()
    gc.disable()
    try:
        before, store = open_files(), DeltaStore.open(tmp_path / "s")
        assert holds_step(store, 2, STEPS[2])
        assert store.steps_of([STEPS[2]["sample_ids"][0]]).size
        accumulate(store, {0: 1.0})
        assert store.verify().ok
        assert open_files() > before
        del store
        assert open_files() == before
    finally:
        gc.enable()


def test_a_store_that_was_read_can_be_pickled(tmp_path):
    store = recorded(tmp_path / "s")
    assert holds_step(store, 2, STEPS[2])
    other = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert holds_step(other, 2, STEPS[2])
    assert other.steps_of([STEPS[2]["sample_ids"][0]]).tolist() == store.steps_of([STEPS[2]["sample_ids"][0]]).tolist()


def test_payloads_are_not_copied_and_outlive_a_purge(tmp_path):
    store = recorded(tmp_path / "s")
    (part,) = store.reader.parts(3)
    assert isinstance(part.step.payload, memoryview)
    before = bytes(part.step.payload)
    other = DeltaStore.open(store.url)
    other.purge([STEPS[3]["sample_ids"][0]], [3])
    assert bytes(part.step.payload) == before  # one reader, one consistent view
    assert holds_step(store, 4, STEPS[4])
    store.refresh()
    assert store.steps_of([STEPS[3]["sample_ids"][0]]).size == 0


def test_whole_files_are_one_request_elsewhere():
    store = recorded(f"memory://{uuid.uuid4().hex}")
    name = f"rank-00000/{store.reader.commits[0].segments[0].name}"
    read = whole_file(store.files, name)
    store.files.delete(name)
    assert len(read(0, 100)) == 100
    with pytest.raises(EOFError, match=name):
        read(0, 10**9)


def test_a_newer_segment_is_refused_naming_both_versions(tmp_path):
    store = recorded(tmp_path / "s")
    ref = store.reader.commits[0].segments[0]
    head = store.files.read(f"rank-00000/{ref.name}", 0, ref.head_bytes)
    newer = head.replace(b'"version":"2"', b'"version":"3"', 1)
    with pytest.raises(StoreMismatchError, match=f"version 1 to {FORMAT_VERSION}, but got 3"):
        open_segment(ref, newer, lambda start, stop: newer[start:stop])


def test_checking_takes_no_memory(tmp_path):
    """64 MB of deltas in one segment are checked, named and repaired in a few."""
    layers = torch.nn.Linear(1000, 1000, bias=False)
    store = make_store(tmp_path / "s", module=layers, keep=1.0)
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(10**6).astype(np.float32))
    with store.writer() as writer:
        for step in range(16):
            writer.append(
                optimizer=0, sample_ids=[step], batch_size=1, seconds=0.0, deltas=[LayerDelta(0, None, values)]
            )
    store.refresh()
    (segment,) = store.reader.commits[0].segments
    assert segment.payload_bytes == 64 * 10**6
    path = tmp_path / "s" / "rank-00000" / segment.name
    with open(path, "r+b") as stream:
        stream.seek(segment.bytes - 10)
        stream.write(b"damage")
    tracemalloc.start()
    try:
        report = store.verify()
        checked = tracemalloc.get_traced_memory()[1]
        store.repair()
        repaired = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.damaged_steps == (15,)
    assert checked < 10 * 10**6  # the initial weights are 4 MB, and are there twice for a moment
    assert repaired < 16 * 10**6
    assert store.verify().ok


def test_a_segment_that_vanishes_is_named(tmp_path):
    store = recorded(tmp_path / "s", flushes=2)
    name = store.reader.commits[0].segments[1].name
    (tmp_path / "s" / "rank-00000" / name).unlink()
    with pytest.raises(StoreCorruptedError, match=rf"{name}.*steps 6 to 11"):
        DeltaStore.open(store.url).record(0)
