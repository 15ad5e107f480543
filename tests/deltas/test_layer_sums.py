import os
import resource

import numpy as np
import pytest
import torch

from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.deltas.layer_sums import layer_sums
from lightning_unlearn.exceptions import MissingDeltaError, StoreCorruptedError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import StepStatus
from tests.helpers.stores import SIZES, Steps, make_store

AMOUNTS = {step: 1.0 - 0.3 * step for step in range(9)}


@pytest.fixture(scope="module", params=[(1, None), (2, None), (1, "zstd"), (2, "zstd")], ids=str)
def recorded(request, tmp_path_factory):
    """A store of one or two ranks, each of which has every second layer."""
    world_size, compression = request.param
    store = make_store(tmp_path_factory.mktemp("s") / "s", world_size=world_size, compression=compression)
    steps = Steps(keep=0.4)
    for rank in range(world_size):
        with store.writer(rank, segment_bytes=3000) as writer:
            for step in range(9):
                mine = [delta for delta in steps[step]["deltas"] if delta.layer % world_size == rank]
                writer.append(**{**steps[step], "deltas": mine})
    return DeltaStore.open(store.url)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory_bytes", [1, 8 * 64, 8 * 300, None])
def test_neither_threads_nor_groups_change_a_bit(recorded, memory_bytes, threads, monkeypatch):
    monkeypatch.setattr("lightning_unlearn.deltas.layer_sums._CHUNK_BYTES", 1500)  # several chunks of several steps
    want = accumulate(recorded, AMOUNTS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        groups = list(layer_sums(recorded, AMOUNTS, memory_bytes=memory_bytes))
    finally:
        torch.set_num_threads(before)
    together = {name: total for group in groups for name, total in group.items()}
    assert list(together) == list(want) == ["a", "b", "c", "d"]
    assert all(torch.equal(together[name], want[name]) for name in want)
    sizes = [sum(8 * total.numel() for total in group.values()) for group in groups]
    if memory_bytes is None:
        assert len(groups) == 1
    else:
        assert all(size <= memory_bytes or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
        assert len(groups) > 1


def test_against_plain_numpy(recorded):
    totals = accumulate(recorded, AMOUNTS)
    for layer, name in enumerate("abcd"):
        want = np.zeros(SIZES[layer])
        for step, amount in AMOUNTS.items():
            delta = Steps(keep=0.4)[step]["deltas"][layer]
            want[slice(None) if delta.indices is None else delta.indices.numpy()] += (
                amount * delta.values.double().numpy()
            )
        np.testing.assert_allclose(totals[name].reshape(-1).numpy(), want, rtol=0, atol=1e-9)


def test_no_thread_is_left_where_it_is_not_read_to_its_end(recorded):
    sums = layer_sums(recorded, AMOUNTS, memory_bytes=1)
    next(sums)
    sums.close()  # the guard of the test session looks for threads


@pytest.mark.parametrize("memory_bytes", [0, -1, 1.5])
def test_memory_bytes_must_be_a_size(recorded, memory_bytes):
    with pytest.raises(ValueError, match="memory_bytes"):
        next(layer_sums(recorded, AMOUNTS, memory_bytes=memory_bytes))


def test_errors_of_a_thread_are_typed(tmp_path, monkeypatch):
    store = make_store(tmp_path / "s")
    with store.writer() as writer:
        Steps().fill(writer, 3)
        writer.append(**Steps().without_delta(3, StepStatus.UNWATCHED))
    store.refresh()
    with pytest.raises(MissingDeltaError, match="UNWATCHED"):
        accumulate(store, {0: 1.0, 3: 1.0})
    (segment,) = (tmp_path / "s" / "rank-00000").glob("segment-*")
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    with pytest.raises(StoreCorruptedError, match="step"):
        accumulate(DeltaStore.open(store.url), {0: 1.0, 1: 1.0, 2: 1.0})

    def damaged(*arguments):
        raise ValueError("does not fit")

    monkeypatch.setattr("lightning_unlearn.deltas.layer_sums.add_encoded", damaged)
    with pytest.raises(StoreCorruptedError, match="does not fit"):
        accumulate(DeltaStore.open(store.url), {0: 1.0})


def test_more_segments_than_files_can_be_open(tmp_path, monkeypatch):
    store, steps = make_store(tmp_path / "s"), Steps()
    monkeypatch.setattr("lightning_unlearn.store.publication.segments_to_merge", lambda *args: None)
    with store.writer() as writer:
        for _ in range(400):
            steps.fill(writer, 1)
            writer.flush()
    store.refresh()
    amounts = dict.fromkeys(range(400), 1.0)
    want = accumulate(store, amounts)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 200, limits[1]))
    try:
        found = accumulate(DeltaStore.open(tmp_path / "s"), amounts)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(torch.equal(total, want[name]) for name, total in found.items())
