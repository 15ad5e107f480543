"""Exact selection against a stable sort in float64, on what is fast, on what is awkward and on what is malicious."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.functional import selection
from lightning_unlearn.functional.selection import Selector

N = 3 * selection._PIECE + 1234
FRACTIONS = (1 / N, 0.01, 0.1, 0.3, 0.9, 1.0)


def oracle(change, k):
    """By falling magnitude and then rising position; never a zero."""
    order = np.argsort(-np.abs(change.astype(np.float64)), kind="stable")[:k]
    return np.sort(order[change[order] != 0])


def gauss(seed=0, n=N):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def sampled(n=N):
    """Where the sample looks."""
    return selection._places(n, max(selection._SAMPLE, n >> 7))


def hidden(inside, outside):
    """Values that are of one kind where the sample looks, and of another elsewhere."""
    values = np.abs(gauss(1)).astype(np.float32) * np.float32(outside)
    values[sampled()] *= np.float32(inside / outside)
    return values


def rows(width):
    """Every column has a scale of its own, so that looking at one column says nothing of the others."""
    return gauss() * np.resize(np.exp(np.linspace(-5, 5, width)).astype(np.float32), N)


def bfloat16(values):
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


CASES = {
    "gauss": gauss,
    "95 % zeros": lambda: gauss() * (np.random.default_rng(1).random(N) < 0.05),
    "zeros": lambda: np.zeros(N, np.float32) * np.float32(-1),
    "one value": lambda: np.sign(gauss()) * np.float32(1e-3),
    "few values": lambda: np.round(gauss() * 2),
    "first step of Adam": lambda: (gauss() + np.sign(gauss(2)) * np.float32(1e-3)) - gauss(),
    "bfloat16 weights": lambda: bfloat16(gauss() + gauss(2) * np.float32(1e-2)) - bfloat16(gauss()),
    "rising": lambda: np.linspace(0, 1, N, dtype=np.float32),
    "falling": lambda: np.linspace(1, 0, N, dtype=np.float32),
    "columns of 512": lambda: rows(512),
    "columns as far apart as the sample": lambda: rows(N // selection._SAMPLE),
    "one large": lambda: np.where(np.arange(N) == N - 1, 1e30, gauss() * 1e-30).astype(np.float32),
    "subnormal": lambda: gauss() * np.float32(1e-41),
    "small where the sample looks": lambda: hidden(1e-6, 1),
    "large where the sample looks": lambda: hidden(1e6, 1),
    "rising, and hidden from the sample": lambda: np.sort(np.abs(gauss())) * (hidden(0, 1) > 0),
}


@pytest.mark.parametrize("case", CASES)
def test_a_table_of_inputs(case):
    change = np.ascontiguousarray(CASES[case](), np.float32)
    selector = Selector()
    zeros = np.zeros_like(change)
    for fraction in FRACTIONS:
        k = math.ceil(fraction * N)
        found = selector.select(change, None, k)
        wanted = oracle(change, k)
        assert found.positions.dtype == np.int32
        assert np.array_equal(found.positions, wanted), (case, fraction)
        assert np.array_equal(found.values, change[wanted])
        of_difference = selector.select(change, zeros, k)
        assert np.array_equal(of_difference.positions, wanted)
        assert np.array_equal(of_difference.values, change[wanted])


def test_it_is_after_minus_before_and_changes_neither():
    before, after = gauss(), gauss() + gauss(3) * np.float32(1e-3)
    kept = before.copy(), after.copy()
    found = Selector().select(after, before, N // 10)
    assert np.array_equal(found.positions, oracle(after - before, N // 10))
    assert np.array_equal(found.values, (after - before)[found.positions])
    assert np.array_equal(before, kept[0])
    assert np.array_equal(after, kept[1])


def test_what_the_sample_misleads_about_is_counted(monkeypatch):
    counted = []
    threshold = Selector._threshold
    monkeypatch.setattr(Selector, "_threshold", lambda self, *args: counted.append(1) or threshold(self, *args))
    change = CASES["large where the sample looks"]()
    assert np.array_equal(Selector().select(change, None, N // 10).positions, oracle(change, N // 10))
    assert len(counted) == 1
    for case in set(CASES) - {"large where the sample looks"}:
        Selector().select(np.ascontiguousarray(CASES[case](), np.float32), None, N // 10)
    assert len(counted) == 1


VALUES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, -1e-45, 1.5]), st.floats(-1e3, 1e3, width=32))


@given(st.lists(VALUES, min_size=1, max_size=400), st.data())
@settings(max_examples=300, deadline=None)
def test_every_path_with_pieces_and_samples_that_are_tiny(values, data):
    change = np.float32(values)
    k = data.draw(st.integers(1, change.size))
    before = np.float32(data.draw(st.lists(VALUES, min_size=change.size, max_size=change.size)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_PIECE", data.draw(st.sampled_from([1, 4, 16, 64])))
        patch.setattr(selection, "_SAMPLE", data.draw(st.sampled_from([1, 4, 32])))
        patch.setattr(selection, "_REDUCTIONS", data.draw(st.integers(0, 2)))
        selector = Selector()
        for subtracted in (None, before):
            whole = change if subtracted is None else change - before
            found = selector.select(change, subtracted, k)
            assert found.positions.tolist() == oracle(whole, k).tolist()
            assert np.array_equal(found.values, whole[found.positions])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -math.nan])
@pytest.mark.parametrize("case", ["gauss", "zeros", "one value"])
@pytest.mark.parametrize("place", [0, N // 2, N - 1])
def test_what_is_not_finite_is_refused_and_located(bad, case, place):
    change = CASES[case]().astype(np.float32)
    change[place] = bad
    for k in (1, N // 10, N):
        with pytest.raises(ValueError, match=f"at position {place}'"):
            Selector().select(change, None, k)


def test_a_difference_of_infinities_is_refused_without_a_warning():
    after, before = gauss(), gauss()
    after[7] = before[7] = math.inf
    with pytest.raises(ValueError, match="nan at position 7"):
        Selector().select(after, before, 3)


def test_scratch_is_that_of_the_largest_result_and_results_are_their_own():
    selector, change = Selector(), gauss()
    first = selector.select(change, None, N // 10)
    kept = first.positions.copy(), first.values.copy()
    held = selector._values.nbytes + selector._positions.nbytes
    assert held <= 8 * (1.25 * N / 10 + selection._PIECE + 1)
    selector.select(-change[::-1].copy(), None, N // 10)
    assert np.array_equal(first.positions, kept[0])
    assert np.array_equal(first.values, kept[1])


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_squares_are_those_of_float64(fraction):
    before, after = gauss(), gauss() + gauss(3) * np.float32(1e-3)
    change = (after - before).astype(np.float64)
    found = Selector().select(after, before, math.ceil(fraction * N))
    dropped, total = Selector().squares(after, before, found.positions)
    rest = change.copy()
    rest[found.positions] = 0
    assert total == pytest.approx(math.fsum(change**2), rel=1e-12)
    assert dropped == pytest.approx(math.fsum(rest**2), rel=1e-12)
    assert (dropped == 0) == (fraction == 1.0)


def test_squares_need_no_memory_of_the_size_of_the_layer():
    values, selector = np.random.default_rng(0).standard_normal(2_000_000).astype(np.float32), Selector()
    positions = selector.select(values, None, values.size // 2).positions
    tracemalloc.start()
    try:
        selector.squares(values, None, positions)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < positions.nbytes / 2
