"""Products, diagonals and solvers against matrices that are written out in float64."""

import pytest
import torch
from torch.nn import functional

from lightning_unlearn.functional.curvature import (
    RankOneInverse,
    conjugate_gradients,
    fisher_product,
    flat_gradient,
    hessian_product,
    label_fisher,
    unflatten,
)

SHAPES = [(4, 3), (4,), (3, 4), (3,)]
SIZE = 31


def start(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE, generator=generator, dtype=torch.float64)


def inputs(n=5):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def network(pieces, x):
    first, bias, second, last = pieces
    return torch.tanh(x @ first.T + bias) @ second.T + last


def parameters(theta):
    return [piece.clone().requires_grad_() for piece in unflatten(theta, [torch.empty(shape) for shape in SHAPES])]


def logits_of(theta, x):
    return network(unflatten(theta, [torch.empty(shape) for shape in SHAPES]), x)


def dense_fisher(theta, x, binary=False):
    """J^T A J by explicit Jacobian and covariance, sample by sample."""
    jacobian = torch.autograd.functional.jacobian(lambda t: logits_of(t, x), theta)
    z = logits_of(theta, x)
    total = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for row, answers in zip(jacobian, z, strict=True):
        if binary:
            p = answers.sigmoid()
            covariance = torch.diag(p * (1 - p)) / len(answers)
        else:
            p = answers.softmax(0)
            covariance = torch.diag(p) - torch.outer(p, p)
        total += row.T @ covariance @ row
    return total / len(x)


def test_a_gradient_is_flat_and_in_order_and_zero_where_nothing_depends():
    theta = start()
    pieces = parameters(theta)
    x, y = inputs()
    loss = functional.cross_entropy(network(pieces, x), y)
    extra = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    found = flat_gradient(loss, [*pieces, extra])
    wanted = torch.autograd.functional.jacobian(lambda t: functional.cross_entropy(logits_of(t, x), y), theta)
    torch.testing.assert_close(found[:SIZE], wanted, rtol=1e-12, atol=1e-14)
    assert found[SIZE:].tolist() == [0.0, 0.0]
    assert flat_gradient(torch.ones((), dtype=torch.float64), pieces).tolist() == [0.0] * SIZE


def test_hessian_products_are_those_of_the_matrix():
    theta, vector = start(), start(1)
    x, y = inputs()
    pieces = parameters(theta)
    found = hessian_product(functional.cross_entropy(network(pieces, x), y), pieces, vector)
    matrix = torch.autograd.functional.hessian(lambda t: functional.cross_entropy(logits_of(t, x), y), theta)
    torch.testing.assert_close(found, matrix @ vector, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("binary", [False, True])
def test_fisher_products_are_those_of_the_matrix(binary):
    theta, vector = start(), start(1)
    x, _ = inputs()
    pieces = parameters(theta)
    found = fisher_product(network(pieces, x), pieces, vector, binary=binary)
    torch.testing.assert_close(found, dense_fisher(theta, x, binary) @ vector, rtol=1e-10, atol=1e-12)


def test_answers_of_many_positions_count_like_samples():
    theta, vector = start(), start(1)
    x, _ = inputs(6)
    pieces = parameters(theta)
    image = network(pieces, x).view(2, 3, 3).transpose(1, 2)  # (N, C, positions)
    flat = fisher_product(network(pieces, x), pieces, vector)
    torch.testing.assert_close(fisher_product(image, pieces, vector), flat, rtol=1e-12, atol=1e-14)


def test_where_logits_are_linear_the_fisher_is_the_hessian():
    x, y = inputs()
    weight = start()[:9].view(3, 3).requires_grad_()
    vector = start(2)[:9]
    found = fisher_product(x @ weight.T, [weight], vector)
    wanted = hessian_product(functional.cross_entropy(x @ weight.T, y), [weight], vector)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("binary", [False, True])
def test_the_diagonal_is_that_of_the_matrix(binary):
    theta = start()
    x, _ = inputs(1)
    pieces = parameters(theta)
    found = label_fisher(network(pieces, x), pieces, binary=binary)
    wanted = dense_fisher(theta, x, binary).diagonal() / (3 if binary else 1)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_the_diagonal_of_multi_label_samples_is_the_mean_of_squares_over_drawn_labels():
    theta = start()
    x, _ = inputs(1)
    pieces = parameters(theta)
    z = network(pieces, x)
    p = z.detach().sigmoid()[0]
    wanted = torch.zeros(SIZE, dtype=torch.float64)
    for bits in torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3):
        chance = float(torch.where(bits == 1, p, 1 - p).prod())
        loss = functional.binary_cross_entropy_with_logits(z, bits[None])
        wanted += chance * flat_gradient(loss, pieces, keep_graph=True).square()
    torch.testing.assert_close(label_fisher(z, pieces, binary=True), wanted, rtol=1e-10, atol=1e-14)


def test_a_diagonal_is_of_one_sample():
    with pytest.raises(ValueError, match="one sample"):
        label_fisher(torch.zeros(2, 3), [])


def definite(n=12, seed=3):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64), torch.randn(
        n, generator=generator, dtype=torch.float64
    )


def test_conjugate_gradients_solve():
    matrix, right = definite()
    found = conjugate_gradients(lambda v: matrix @ v, right, max_iterations=100, tolerance=1e-12)
    torch.testing.assert_close(found.vector, torch.linalg.solve(matrix, right), rtol=1e-7, atol=1e-9)
    assert found.residual <= 1e-12
    assert found.curvature >= float(torch.linalg.eigvalsh(matrix)[0])


def test_conjugate_gradients_end_after_as_many_products_as_there_are_eigenvalues():
    matrix = torch.diag(torch.tensor([1.0, 1.0, 5.0, 5.0, 9.0], dtype=torch.float64))
    products = []

    def product(v):
        products.append(1)
        return matrix @ v

    found = conjugate_gradients(product, torch.ones(5, dtype=torch.float64), tolerance=1e-10)
    assert found.iterations == len(products) == 3
    assert conjugate_gradients(product, torch.ones(5, dtype=torch.float64), max_iterations=2).iterations == 2
    assert conjugate_gradients(product, torch.zeros(5, dtype=torch.float64)).vector.tolist() == [0.0] * 5


def test_negative_curvature_is_met_and_said():
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    found = conjugate_gradients(lambda v: matrix @ v, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert found.curvature == pytest.approx(-0.6)
    assert found.vector.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("damping", [1.0, 0.01])
def test_the_rank_one_recursion_is_the_inverse_at_every_step(damping):
    generator = torch.Generator().manual_seed(5)
    gradients = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    vector = torch.randn(9, generator=generator, dtype=torch.float64)
    inverse = RankOneInverse(damping, 6)
    for k in range(7):
        matrix = damping * torch.eye(9, dtype=torch.float64) + gradients[:k].T @ gradients[:k] / 6
        torch.testing.assert_close(inverse.times(vector), torch.linalg.solve(matrix, vector), rtol=1e-9, atol=1e-9)
        if k < 6:
            inverse.add(gradients[k])


def test_bad_settings():
    with pytest.raises(ValueError, match="damping"):
        RankOneInverse(0.0, 3)
    with pytest.raises(ValueError, match="n"):
        RankOneInverse(1.0, 0)
    with pytest.raises(ValueError, match="max_iterations"):
        conjugate_gradients(lambda v: v, torch.ones(2), max_iterations=0)
