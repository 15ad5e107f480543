"""The compact L-BFGS matrix against the BFGS update on dense matrices, in float64."""

import pytest
import torch

from lightning_unlearn.functional.limited_memory import LimitedMemoryHessian

N = 7


def pairs(count, noise=0.3):
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(N, N, generator=generator, dtype=torch.float64)
    hessian = root @ root.T + torch.eye(N, dtype=torch.float64)
    found = []
    for _ in range(count):
        s = torch.randn(N, generator=generator, dtype=torch.float64)
        found.append((s, hessian @ s + noise * torch.randn(N, generator=generator, dtype=torch.float64)))
    return found


def dense(used):
    """The BFGS recursion of the Hessian, from a multiple of the identity, oldest pair first."""
    s, y = used[-1]
    matrix = torch.eye(N, dtype=torch.float64) * (s @ y) / (s @ s)
    for s, y in used:
        bent = matrix @ s
        matrix = matrix - torch.outer(bent, bent) / (s @ bent) + torch.outer(y, y) / (s @ y)
    return matrix


@pytest.mark.parametrize("history", [1, 2, 5])
def test_products_are_those_of_the_dense_matrix(history):
    hessian, all_pairs = LimitedMemoryHessian(history), pairs(6)
    for s, y in all_pairs:
        assert hessian.add(s, y)
    matrix = dense(all_pairs[-history:])
    for column in torch.eye(N, dtype=torch.float64):
        torch.testing.assert_close(hessian.times(column), matrix @ column, rtol=1e-10, atol=1e-10)
    newest = all_pairs[-1]
    torch.testing.assert_close(hessian.times(newest[0]), newest[1], rtol=1e-10, atol=1e-10)
    assert float(torch.linalg.eigvalsh(matrix).min()) > 0
    assert len(hessian) == history


def test_as_many_exact_pairs_as_dimensions_are_the_hessian():
    used = pairs(0, 0.0)
    generator = torch.Generator().manual_seed(4)
    root = torch.randn(N, N, generator=generator, dtype=torch.float64)
    target = root @ root.T + torch.eye(N, dtype=torch.float64)
    # Directions that are conjugate: BFGS then ends at the matrix itself.
    directions = torch.linalg.eigh(target).eigenvectors.T
    hessian = LimitedMemoryHessian(N)
    for s in directions:
        used.append((s, target @ s))
        assert hessian.add(s, target @ s)
    vector = torch.randn(N, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(hessian.times(vector), target @ vector, rtol=1e-9, atol=1e-9)


def test_pairs_without_positive_curvature_are_refused():
    hessian = LimitedMemoryHessian(2)
    s = torch.ones(N, dtype=torch.float64)
    assert not hessian.add(s, -s)
    assert not hessian.add(s, torch.zeros_like(s))
    assert not hessian.add(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert not hessian.add(s, torch.full_like(s, float("nan")))
    assert len(hessian) == 0
    with pytest.raises(ValueError, match="Add one first"):
        hessian.times(s)


def test_a_pair_twice_is_no_singular_matrix():
    hessian, ((s, y), *_) = LimitedMemoryHessian(2), pairs(1)
    assert hessian.add(s, y)
    assert hessian.add(s, y)
    torch.testing.assert_close(hessian.times(s), y, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="history"):
        LimitedMemoryHessian(0)
