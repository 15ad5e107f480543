import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.functional import kernels
from lightning_unlearn.functional.kernels import KERNEL_VARIABLE, load_add_gaps

pytest.importorskip("numba")


def codes_of(positions):
    gaps = np.diff(positions, prepend=-1) - 1
    return b"".join(b"\xff" * (int(gap) // 255) + bytes([int(gap) % 255]) for gap in gaps)


def arguments(several, values, factors):
    parts = [codes_of(one) for one in several]
    codes = np.frombuffer(bytearray(b"".join(parts)), np.uint8)
    code_offsets = np.cumsum([0, *map(len, parts)])
    value_offsets = np.cumsum([0, *(one.size for one in several)])
    return codes, code_offsets, values, value_offsets, np.array(factors, np.float64)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 500, 65_535, 65_536, 65_537, 200_000]), st.integers(1, 5), st.integers(0, 2**32))
def test_bit_for_bit_one_addition_after_the_other(numel, steps, seed):
    rng = np.random.default_rng(seed)
    several = [np.sort(rng.choice(numel, rng.integers(0, min(numel, 3000) + 1), replace=False)) for _ in range(steps)]
    values = rng.standard_normal(sum(one.size for one in several)).astype(np.float32)
    factors = rng.standard_normal(steps)
    total = rng.standard_normal(numel)
    want, place = total.copy(), 0
    for one, factor in zip(several, factors, strict=True):
        want[one] += values[place : place + one.size].astype(np.float64) * factor
        place += one.size
    assert load_add_gaps("numba")(total, *arguments(several, values, factors)) is True
    assert np.array_equal(total, want)


@pytest.mark.parametrize("fault", ["outside", "far outside", "too few values", "too many values", "ends in an escape"])
def test_what_does_not_fit_is_told_and_stays_inside(fault):
    positions, values = np.array([3, 90]), np.ones(2, np.float32)
    codes, code_offsets, values, value_offsets, factors = arguments([positions], values, [1.0])
    numel = 100
    if fault == "outside":
        numel = 90
    if fault == "far outside":
        codes = np.concatenate([np.full(1000, 255, np.uint8), codes])
        code_offsets = np.array([0, codes.size])
    if fault == "too few values":
        values, value_offsets = values[:1].copy(), np.array([0, 1])
    if fault == "too many values":
        values, value_offsets = np.ones(3, np.float32), np.array([0, 3])
    if fault == "ends in an escape":
        codes, code_offsets = np.append(codes, np.uint8(255)), np.array([0, codes.size + 1])
    room = np.zeros(numel + 64)
    fits = load_add_gaps("numba")(room[:numel], codes, code_offsets, values, value_offsets, factors)
    assert fits is (fault == "ends in an escape")
    assert not room[numel:].any()


def test_the_choice(monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, "numpy")
    assert load_add_gaps() is None
    assert load_add_gaps("numba") is not None
    monkeypatch.setenv(KERNEL_VARIABLE, "fortran")
    with pytest.raises(ValueError, match=KERNEL_VARIABLE):
        load_add_gaps()


def test_where_it_cannot_be_had(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    kernels._compile.cache_clear()
    try:
        assert load_add_gaps("auto") is None
        assert load_add_gaps() is None
        with pytest.raises(MissingRequirementError, match="kernel") as caught:
            load_add_gaps("numba")
        assert isinstance(caught.value.__cause__, ImportError)
        assert kernels._compile.cache_info().misses == 1  # it is not looked for again at every layer
    finally:
        kernels._compile.cache_clear()
