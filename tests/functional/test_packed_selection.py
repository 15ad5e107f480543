"""Selection without waiting, on tensors of the CPU and, where there is one, of a CUDA device."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.functional.packed_selection import largest_packed
from lightning_unlearn.functional.pruning import largest_entries

VALUES = st.lists(
    st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45]), st.floats(-1e3, 1e3, width=32)),
    min_size=1,
    max_size=60,
)
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


def packed(values, k, squares=None):
    positions = torch.full((k,), 77, dtype=torch.int32, device=values.device)
    kept = torch.empty(k, device=values.device)
    count = torch.empty((), dtype=torch.int64, device=values.device)
    largest_packed(values, k, positions, kept, count, squares)
    return positions.cpu(), kept.cpu(), int(count)


@given(VALUES, st.data())
@settings(max_examples=200, deadline=None)
def test_it_is_the_selection_of_the_host(values, data):
    tensor = torch.tensor(values)
    k = data.draw(st.integers(1, len(values)))
    wanted = largest_entries(tensor, k)
    positions, kept, count = packed(tensor, k)
    assert count == wanted.numel()
    assert positions[:count].tolist() == wanted.tolist()
    assert positions[count:].tolist() == [-1] * (k - count)
    assert torch.equal(kept[:count], tensor[wanted])


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("levels", [3, 10**9])
def test_large_input_and_squares(device, levels):
    values = torch.randn(20_011, generator=torch.Generator().manual_seed(0))
    values = (values * levels).round() / levels
    squares = torch.ones(2, dtype=torch.float64, device=device)
    for k in (1, 2_002, 20_011):
        squares.fill_(1)
        positions, kept, count = packed(values.to(device), k, squares)
        wanted = largest_entries(values, k)
        assert torch.equal(positions[:count].long(), wanted)
        assert torch.equal(kept[:count], values[wanted])
        rest = values.double().numpy().copy()
        rest[wanted] = 0
        assert squares.tolist() == pytest.approx(
            [1 + math.fsum(rest**2), 1 + math.fsum(values.double().numpy() ** 2)], rel=1e-12
        )
    assert np.isfinite(squares.cpu().numpy()).all()
