"""The number of segments stays logarithmic, so do the rewritings of each step, and nothing changes."""

import itertools
import math
import resource
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.exceptions import StoreCorruptedError
from lightning_unlearn.store.commits import CommitLog
from lightning_unlearn.store.compaction import merge_segments, mergeable_neighbours, segments_to_merge
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.segment import SegmentRef
from tests.helpers.stores import Steps, holds_step, make_store

STEPS = Steps(keys=True)


def refs_of(sizes):
    return [SegmentRef(f"s{i}", i, i + 1, size, 0, "") for i, size in enumerate(sizes)]


def merged(refs, run):
    part = refs[run]
    one = SegmentRef("m", part[0].start, part[-1].stop, sum(ref.bytes for ref in part), 0, "")
    return [*refs[: run.start], one, *refs[run.stop :]]


def simulate(sizes, segment_bytes):
    """The most segments there ever were, and how often each publication was written anew."""
    refs, most, rewrites = [], 0, [0] * len(sizes)
    for i, size in enumerate(sizes):
        refs.append(SegmentRef("s", i, i + 1, size, 0, ""))
        while (run := segments_to_merge(refs, segment_bytes)) is not None:
            assert sum(ref.bytes for ref in refs[run]) <= segment_bytes
            for step in range(refs[run][0].start, refs[run][-1].stop):
                rewrites[step] += 1
            refs = merged(refs, run)
        most = max(most, len(refs))
    assert [ref.start for ref in refs] == [0, *(ref.stop for ref in refs)][:-1]
    return most, rewrites


def test_equal_publications():
    most, rewrites = simulate([1000] * 5000, 10**9)
    assert most <= 8 * math.log(5000, 4) + 8
    assert max(rewrites) <= math.log(5000, 4) + 1


def test_full_segments_are_left_alone():
    most, rewrites = simulate([900, 50] * 100, 1000)
    assert rewrites == [0] * 200
    assert most == 200


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 4000), min_size=20, max_size=300), st.sampled_from([5_000, 10**6, 10**9]))
def test_random_publications(sizes, segment_bytes):
    _, rewrites = simulate(sizes, segment_bytes)
    assert max(rewrites) <= math.log(max(segment_bytes / min(sizes), 4), 4) + 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 1200), max_size=40))
def test_merging_on_request_ends_where_no_two_neighbours_fit(sizes):
    refs = refs_of(sizes)
    while (run := mergeable_neighbours(refs, 1000)) is not None:
        assert run.stop - run.start >= 2
        refs = merged(refs, run)
    assert sum(ref.bytes for ref in refs) == sum(sizes)
    assert all(a.bytes + b.bytes > 1000 for a, b in itertools.pairwise(refs))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_merged_segment_holds_every_step(tmp_path, compression):
    store = make_store(tmp_path / "s", compression=compression)
    for count in (3, 1, 4, 2):
        with store.writer() as writer:
            STEPS.fill(writer, count)
    log = CommitLog(store.files, store.store_id, 0)
    refs = log.head.segments
    assert len(refs) == 4
    one = merge_segments(store.files, log, store.store_id, refs[1:])
    assert (one.start, one.stop) == (3, 10)
    assert DeltaStore.open(store.url).verify().orphans == (f"rank-00000/{one.name}",)
    log.commit([refs[0], one])
    log.clean()
    log.release()
    store.refresh()
    assert all(holds_step(store, step, STEPS[step]) for step in range(10))
    assert store.verify().ok


def test_damage_is_not_merged_away(tmp_path):
    store = make_store(tmp_path / "s")
    for _ in range(2):
        with store.writer() as writer:
            STEPS.fill(writer, 2)
    log = CommitLog(store.files, store.store_id, 0)
    path = tmp_path / "s" / "rank-00000" / log.head.segments[1].name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    before = store.files.names("rank-00000")
    with pytest.raises(StoreCorruptedError, match=path.name):
        merge_segments(store.files, log, store.store_id, log.head.segments)
    assert store.files.names("rank-00000") == before
    log.release()


def test_only_neighbours_are_merged(tmp_path):
    store = make_store(tmp_path / "s")
    log = CommitLog(store.files, store.store_id, 0)
    first, *_ = refs_of([10, 10])
    for refs in ([], [first, replace(first, start=5, stop=6)]):
        with pytest.raises(ValueError, match="adjoining"):
            merge_segments(store.files, log, store.store_id, refs)
    log.release()


def test_more_segments_than_files_can_be_open(tmp_path, monkeypatch):
    store = make_store(tmp_path / "store")
    monkeypatch.setattr("lightning_unlearn.store.publication.segments_to_merge", lambda *args: None)
    with store.writer() as writer:
        for _ in range(300):
            STEPS.fill(writer, 1)
            writer.flush()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        assert store.compact() == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    store.refresh()
    assert len(store.reader.commits[0].segments) == 1
    assert all(holds_step(store, step, STEPS[step]) for step in range(300))
