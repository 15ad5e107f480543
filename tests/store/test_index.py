import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.store.index import StepIndex, in_ranges
from lightning_unlearn.store.records import encode_step
from lightning_unlearn.store.segment import build_segment
from lightning_unlearn.store.segment_reader import Segment
from lightning_unlearn.types import StepStatus

IDS = st.one_of(st.integers(0, 12), st.sampled_from(["a", "b", "7"]))
STEP_LISTS = st.lists(st.lists(IDS, max_size=6), min_size=1, max_size=12)


def failed(segment, error):
    raise AssertionError(segment.ref.name) from error


def segments_of(steps, cut, status=StepStatus.STORED):
    made = []
    for start, part in ((0, steps[:cut]), (cut, steps[cut:])):
        if part:
            encoded = [
                encode_step(optimizer=0, sample_ids=tuple(one), batch_size=len(one), seconds=1.0 + len(one),
                            status=status, layers=[], compression=None)
                for one in part
            ]  # fmt: skip
            ref, chunks = build_segment(encoded, name="s", start=start, rank=0, store_id="", compression=None)
            data = memoryview(b"".join(chunks))
            read = partial(lambda data, start, stop: data[start:stop], data)
            made.append(Segment(ref, chunks[0], read))
    return made


@settings(deadline=None, max_examples=200)
@given(STEP_LISTS, STEP_LISTS, st.integers(0, 12), st.sets(IDS, max_size=4), st.booleans())
def test_against_plain_loops(first, second, cut, wanted, ranged):
    n_steps = min(len(first), len(second))
    index = StepIndex(
        [segments_of(first, cut), segments_of(second, min(cut, 1), StepStatus.UNWATCHED)], n_steps, failed
    )
    within = [(1, 3), (5, 9)] if ranged else None
    visible = [s for s in range(n_steps) if within is None or any(a <= s < b for a, b in within)]
    merged = {s: first[s] + second[s] for s in range(n_steps)}
    counts = {s: sum(Counter(merged[s])[one] for one in wanted) for s in visible}
    steps, found = index.counts_of(wanted, within)
    assert dict(zip(steps.tolist(), found.tolist(), strict=True)) == {s: c for s, c in counts.items() if c}
    assert steps.dtype == np.int64
    assert index.ids_in(visible) == {one for s in visible for one in merged[s]}
    assert index.unseen(sorted(wanted, key=str), within) == [
        one for one in sorted(wanted, key=str) if not any(one in merged[s] for s in visible)
    ]
    assert index.batch_sizes.tolist() == [len(merged[s]) for s in range(n_steps)]
    assert index.seconds.tolist() == [1.0 + max(len(first[s]), len(second[s])) for s in range(n_steps)]
    assert set(index.status.tolist()) <= {StepStatus.UNWATCHED}
    assert index.count_distinct() == len({one for s in range(n_steps) for one in merged[s]})


@pytest.mark.parametrize("within", [[], [(2, 2)], [(0, 1), (1, 4), (6, 7)]])
def test_ranges(within):
    steps = np.arange(10)
    assert in_ranges(steps, within).tolist() == [any(a <= s < b for a, b in within) for s in steps]


@pytest.mark.parametrize("keys", [False, True])
def test_a_look_up_among_a_million_ids_is_faster_than_reading_them(keys):
    per_step, steps = 1000, 1000
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 50_000, (steps, per_step)).tolist()
    lists = [[f"u{one}" for one in row] for row in rows] if keys else rows
    index = StepIndex([segments_of(lists, 500)], steps, failed)
    wanted = lists[3][:100]
    started = time.perf_counter()
    found, counts = index.counts_of(wanted)
    seconds = time.perf_counter() - started
    started, asked = time.perf_counter(), set(wanted)
    total = sum(one in asked for row in lists for one in row)
    plain = time.perf_counter() - started
    assert counts.sum() == total
    assert 3 in found
    assert seconds < plain
