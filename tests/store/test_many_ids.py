"""Looking ids up among millions: right, in little memory, and reading little. The time is a benchmark's."""

import tracemalloc

import numpy as np
import pytest

from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.many_ids import drawn_ids, store_of_many_ids


def check(url, count, samples, asked_number):
    """The most memory that a look-up took; fails where its steps are wrong."""
    store_of_many_ids(url, count, samples)
    asked = np.random.default_rng(1).choice(samples, asked_number, replace=False)
    store = DeltaStore.open(url)
    steps, counts = store.counts_of(asked)
    wanted = np.zeros(samples, np.bool_)
    wanted[asked] = True
    want = np.concatenate([wanted[ids].sum(1) for ids in drawn_ids(count, samples)])
    assert np.array_equal(steps, np.flatnonzero(want))
    assert np.array_equal(counts, want[steps])
    assert store.unseen([*asked.tolist(), samples]) == [samples]
    tracemalloc.start()
    store.steps_of(asked)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return memory


def test_two_million_ids(tmp_path):
    memory = check(tmp_path / "s", 2 * 10**6, 10**5, 100)
    assert memory < 40 * 10**6


@pytest.mark.slow
def test_a_hundred_million_ids(tmp_path):
    memory = check(tmp_path / "s", 10**8, 10**6, 1000)
    assert memory < 200 * 10**6


def test_opening_and_looking_up_read_little_of_a_large_store(tmp_path, monkeypatch):
    store_of_many_ids(tmp_path / "s", 6 * 10**6, 10**6)
    store, read = DeltaStore.open(tmp_path / "s"), []
    plain = store.reader._views.read

    def counting(name, start, stop):
        read.append(stop - start)
        return plain(name, start, stop)

    monkeypatch.setattr(store.reader._views, "read", counting)
    total = sum(ref.bytes for ref in store.reader.commits[0].segments)
    heads = sum(ref.head_bytes for ref in store.reader.commits[0].segments)
    _ = store.reader.index
    assert read == []
    assert heads < total / 8
    store.steps_of([7])
    assert 0 < sum(read) < 6 * 8 * 1024
