"""Placement as a flow problem: bounds always hold, and a solution is found whenever there is one."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.data.placement import batch_caps, place_subjects


def feasible(counts, sizes, caps):
    """Maximum flow by brute force over all cuts: every subset of subjects needs that much room in some split."""
    n = len(counts)
    for subjects in itertools.product([0, 1], repeat=n):
        chosen = [i for i in range(n) if subjects[i]]
        room = sum(min(size, cap * len(chosen)) for size, cap in zip(sizes, caps, strict=True))
        if sum(counts[i] for i in chosen) > room:
            return False
    return True


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.integers(1, 8),
    st.sampled_from([0.2, 0.3, 0.5, 0.75, 1.0]),
    st.integers(0, 30),
    st.integers(0, 5),
)
@settings(max_examples=300, deadline=None)
def test_every_row_is_placed_within_bounds_exactly_when_possible(counts, batch, max_share, others, seed):
    total = sum(counts) + others
    sizes = [batch] * (total // batch) + ([total % batch] if total % batch else [])
    caps = batch_caps(sizes, max_share)
    if not feasible(counts, sizes, caps):
        with pytest.raises(ValueError, match="max_share"):
            place_subjects(counts, sizes, max_share, np.random.default_rng(seed))
        return
    placed = place_subjects(counts, sizes, max_share, np.random.default_rng(seed))
    for rows, size, cap in zip(placed, sizes, caps, strict=True):
        assert sum(rows.values()) <= size
        assert all(0 < count <= cap for count in rows.values())
    assert [sum(rows.get(subject, 0) for rows in placed) for subject in range(len(counts))] == counts


def test_chunks_are_as_few_and_as_equal_as_possible_where_there_is_room():
    placed = place_subjects([33, 20, 1], [64] * 10, 0.5, np.random.default_rng(0))
    for subject, wanted in enumerate([[16, 17], [20], [1]]):
        assert sorted(rows[subject] for rows in placed if subject in rows) == wanted


def test_caps_read_the_decimal_number():
    assert batch_caps([100, 7, 1, 0], 0.29) == [29, 2, 1, 0]
