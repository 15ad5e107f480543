"""Selection against a slow oracle, on inputs with ties, zeros and every awkward size."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.functional.pruning import (
    Pruning,
    keep_of,
    kept_count,
    largest_entries,
    random_entries,
    split_positions,
)
from lightning_unlearn.functional.selection import Selector

# Few distinct values, both signs, zeros of both signs and subnormals: ties and zeros in nearly every example.
VALUES = st.lists(
    st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, -1e-45]), st.floats(-1e3, 1e3, width=32)), max_size=60
)


def oracle(values, k):
    """Plain Python: sort by magnitude, then position; never a zero."""
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    return sorted(i for i in order[:k] if values[i] != 0)


@given(VALUES, st.data())
@settings(max_examples=200, deadline=None)
def test_is_the_oracle_on_every_path(values, data):
    k = data.draw(st.integers(0, len(values)))
    tensor = torch.tensor(values, dtype=torch.float32)
    wanted = oracle(tensor.tolist(), k)
    assert largest_entries(tensor, k).tolist() == wanted
    assert largest_entries(tensor, k, Selector()).tolist() == wanted
    assert largest_entries(tensor.double(), k).tolist() == wanted


@given(st.lists(VALUES, min_size=1, max_size=4), st.data())
@settings(max_examples=100, deadline=None)
def test_global_scope_is_one_selection_over_the_concatenation(layers, data):
    flat = [value for layer in layers for value in layer]
    k = data.draw(st.integers(0, len(flat)))
    tensors = [torch.tensor(layer, dtype=torch.float32) for layer in layers]
    starts = np.cumsum([0, *map(len, layers)])
    kept = split_positions(largest_entries(torch.cat(tensors), k), [one.numel() for one in tensors])
    joined = [int(start) + i for start, part in zip(starts, kept, strict=False) for i in part.tolist()]
    assert joined == oracle(torch.cat(tensors).tolist(), k)


def test_float64_is_not_rounded_before_it_is_compared():
    values = torch.tensor([1.0, 1.0 + 1e-12, -1.0 - 2e-12], dtype=torch.float64)
    assert largest_entries(values, 2).tolist() == [1, 2]
    assert largest_entries(values.float(), 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    "settings",
    [{"keep": 0}, {"keep": {"a": 2.0}}, {"keep": True}, {"when": "never"}, {"criterion": "small"}, {"seed": -1}],
)
def test_a_pruning_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Pruning(**settings)


def test_what_a_pruning_keeps_of_a_layer():
    assert Pruning().fraction_of("a") == 1.0
    assert Pruning(0.3).fraction_of("a") == 0.3
    assert [Pruning({"*.b": 0.5, "h.*": 0.2}).fraction_of(name) for name in ("h.b", "h.w", "x")] == [0.5, 0.2, 1.0]
    assert Pruning.of(None) == Pruning()
    assert Pruning.of({"a": 0.5}) == Pruning({"a": 0.5})
    assert Pruning.of(Pruning(0.1, "sum")) == Pruning(0.1, "sum")


def test_large_input_agrees_with_a_full_sort():
    values = torch.randn(100_003, generator=torch.Generator().manual_seed(1))
    values[::3] = 0
    for k in (1, 10_001, 60_000, 70_000, 100_003):
        wanted = np.sort(np.argsort(-values.abs().numpy(), kind="stable")[: min(k, int((values != 0).sum()))])
        assert np.array_equal(largest_entries(values, k).numpy(), wanted)


@pytest.mark.parametrize("n", [2_048, 6_000])
@pytest.mark.parametrize("kind", ["few values", "one value", "half precision", "mostly zero", "ties and zeros"])
def test_ties_in_large_input(kind, n):
    generator = torch.Generator().manual_seed(2)
    gauss = torch.randn(n, generator=generator)
    values = {
        "few values": gauss.sign() * 1e-3 + (gauss * 3).round() * 1e-10,
        "one value": torch.full((n,), -2.0),
        "half precision": ((gauss + 1).bfloat16() - gauss.bfloat16()).float(),
        "mostly zero": gauss * (torch.rand(n, generator=generator) < 0.12),
        "ties and zeros": gauss.sign() * (torch.rand(n, generator=generator) < 0.5),
    }[kind]
    for k in (1, n // 10, n // 2, n - 1):
        wanted = np.sort(np.argsort(-values.abs().numpy(), kind="stable")[: min(k, int((values != 0).sum()))])
        assert np.array_equal(largest_entries(values, k).numpy(), wanted)
    values[n // 2] = math.inf
    with pytest.raises(ValueError, match=f"position {n // 2}"):
        largest_entries(values, n // 10)


def test_does_not_change_its_argument_and_reads_strided_tensors():
    values = torch.randn(50, 2).t()[1]
    before = values.clone()
    assert largest_entries(values, 5).tolist() == oracle(before.tolist(), 5)
    assert torch.equal(values, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_other_devices_select_the_same():
    values = torch.randint(-3, 4, (1000,), generator=torch.Generator().manual_seed(0)).float()
    for k in (0, 1, 100, 999, 1000):
        assert torch.equal(largest_entries(values.cuda(), k).cpu(), largest_entries(values, k))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [0, 1, 3, 4])
def test_non_finite_is_refused_and_located(bad, k):
    with pytest.raises(ValueError, match="at position 2"):
        largest_entries(torch.tensor([1.0, 0.0, bad, 2.0]), k)


@pytest.mark.parametrize(
    ("values", "k"),
    [
        (torch.zeros(2, 2), 1),
        (torch.zeros(3, dtype=torch.float16), 1),
        (torch.zeros(3), 4),
        (torch.zeros(3), -1),
    ],
)
def test_bad_arguments_are_refused(values, k):
    with pytest.raises(ValueError, match="Expected"):
        largest_entries(values, k)


@given(st.integers(0, 10**9), st.integers(1, 10**6))
@settings(deadline=None)
def test_kept_count_reads_the_decimal_number(numel, millionths):
    keep = millionths / 10**6
    count = kept_count(numel, keep)
    assert Fraction(count - 1) < Fraction(millionths, 10**6) * numel <= count


@pytest.mark.parametrize("keep", [0, -0.1, 1.0001, math.nan, True, "0.1"])
def test_kept_count_refuses(keep):
    with pytest.raises(ValueError, match="keep"):
        kept_count(10, keep)


def test_keep_of_takes_the_first_match_and_case_matters():
    overrides = {"*.bias": 1.0, "Head.*": 0.5, "*": 0.2}
    assert keep_of("head.bias", 0.1, overrides) == 1.0
    assert keep_of("Head.weight", 0.1, overrides) == 0.5
    assert keep_of("head.weight", 0.1, overrides) == 0.2
    assert keep_of("head.weight", 0.1, {}) == 0.1


def test_random_entries_are_uniform_exact_and_leave_global_state_alone():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    counts = np.zeros(10)
    for step in range(2000):
        drawn = random_entries(10, 3, (5, step))
        assert drawn.dtype == torch.int64
        assert drawn.numel() == 3
        assert (drawn.diff() > 0).all()
        counts[drawn] += 1
    assert torch.equal(state[0], torch.get_rng_state())
    assert np.array_equal(state[1], np.random.get_state()[1])  # noqa: NPY002
    # 2000 draws with probability 0.3: standard deviation 20.5, so 5 of them is beyond any fixed seed's bad luck.
    assert np.abs(counts - 600).max() < 103
    assert random_entries(10, 3, (5, 0)).tolist() != random_entries(10, 3, (5, 1)).tolist()
    assert random_entries(7, 7, 0).tolist() == list(range(7))
    with pytest.raises(ValueError, match="between 0 and the 3 entries"):
        random_entries(3, 4, 0)
