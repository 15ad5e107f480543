"""The largest curvature against the eigenvalues of the dense Hessian, for both signs and for ties."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_unlearn.functional.curvature import hessian_product
from lightning_unlearn.functional.power_iteration import TopCurvature, curvature_estimate, top_curvature

PRECISE = {"max_iterations": 20_000, "tolerance": 1e-13}


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network_loss(sign):
    """A three-layer network's loss (its negative is what gradient ascent follows) as a function of flat weights."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    x, y = random(12, 4), torch.arange(12) % 3

    def loss(flat):
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        named = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return sign * functional.cross_entropy(torch.func.functional_call(net, named, (x,)), y)

    return loss, nn.utils.parameters_to_vector(net.parameters()).detach().requires_grad_()


def rotated(*eigenvalues):
    basis, _ = torch.linalg.qr(random(len(eigenvalues), len(eigenvalues), seed=7))
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


@pytest.mark.parametrize("sign", [1, -1])
def test_agrees_with_the_dense_hessian_of_a_network(sign):
    loss, flat = network_loss(sign)
    eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat.detach()))
    largest = float(eigenvalues[eigenvalues.abs().argmax()])
    assert math.copysign(1, largest) == sign
    found = top_curvature(lambda v: hessian_product(loss(flat), [flat], v), random(len(flat)), **PRECISE)
    assert found.converged
    assert found.singular_value == pytest.approx(abs(largest), rel=1e-9)
    assert found.eigenvalue == pytest.approx(largest, rel=1e-6)
    image = hessian_product(loss(flat), [flat], found.vector)
    torch.testing.assert_close(image, found.eigenvalue * found.vector, rtol=0, atol=1e-4 * abs(largest))
    rough = top_curvature(lambda v: hessian_product(loss(flat), [flat], v), random(len(flat)))
    assert rough.converged
    assert rough.singular_value == pytest.approx(abs(largest), rel=0.05)


def test_with_both_signs_equally_large_the_singular_value_is_right():
    product = rotated(5.0, -5.0, 1.0, -0.5, 0.0)
    start = random(5)
    found = top_curvature(lambda v: product @ v, start, **PRECISE)
    assert found.converged
    assert found.singular_value == pytest.approx(5.0, rel=1e-9)
    # Each sign keeps the share that the start has of it, so their quotient lies anywhere between the two.
    _, vectors = torch.linalg.eigh(product)
    negative, positive = float(start @ vectors[:, 0]) ** 2, float(start @ vectors[:, -1]) ** 2
    assert found.eigenvalue == pytest.approx(5.0 * (positive - negative) / (positive + negative), rel=1e-6)
    w = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    saddle = top_curvature(lambda v: hessian_product(3 * w[0] * w[1], [w], v), random(2), **PRECISE)
    assert saddle.singular_value == pytest.approx(3.0, rel=1e-12)


def test_a_slightly_larger_negative_curvature_is_found():
    product = rotated(2.0, -2.02, 1.0)
    found = top_curvature(lambda v: product @ v, random(3), **PRECISE)
    assert found.singular_value == pytest.approx(2.02, rel=1e-9)
    assert found.eigenvalue == pytest.approx(-2.02, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_it_grows_and_is_never_too_large(seed):
    product = random(6, 6, seed=seed)
    product = product + product.T
    largest = float(torch.linalg.eigvalsh(product).abs().max())
    values = [
        top_curvature(lambda v: product @ v, random(6), max_iterations=n, tolerance=0).singular_value
        for n in range(1, 30)
    ]
    assert all(later >= earlier * (1 - 1e-12) for earlier, later in itertools.pairwise(values))
    assert values[-1] <= largest * (1 + 1e-12)
    assert values[0] < 0.9 * largest


def test_numbers_belong_to_the_vector_and_products_are_counted():
    product, calls = rotated(3.0, 2.9, -1.0), []

    def counted(vector):
        calls.append(vector)
        return product @ vector

    start = 7 * random(3)
    found = top_curvature(counted, start, max_iterations=4, tolerance=0)
    assert (found.iterations, len(calls), found.converged) == (4, 4, False)
    assert float(found.vector.norm()) == pytest.approx(1)
    assert found.singular_value == pytest.approx(float((product @ found.vector).norm()), rel=1e-12)
    assert found.eigenvalue == pytest.approx(float(found.vector @ product @ found.vector), rel=1e-12)
    expected = start
    for _ in range(3):
        expected = product @ expected
    torch.testing.assert_close(found.vector, expected / expected.norm())


def test_the_tolerance_is_a_relative_change():
    scale = 1e-9  # absolute, it would be met at once
    product = rotated(3.0, 2.0, -1.0)
    one = top_curvature(lambda v: product @ v, random(3))
    other = top_curvature(lambda v: scale * product @ v, random(3))
    assert one.iterations == other.iterations > 3
    assert other.singular_value == pytest.approx(scale * one.singular_value)


def test_an_operator_of_zero_has_converged_at_zero():
    found = top_curvature(torch.zeros_like, random(4))
    assert (found.singular_value, found.eigenvalue, found.iterations, found.converged) == (0.0, 0.0, 1, True)


def test_a_start_across_the_top_direction_finds_the_next():
    product = torch.diag(torch.tensor([9.0, 2.0, -1.0]))
    found = top_curvature(lambda v: product @ v, torch.tensor([0.0, 1.0, 1.0]), **PRECISE)
    assert found.singular_value == pytest.approx(2.0)
    nowhere = top_curvature(lambda v: torch.diag(torch.tensor([9.0, 0.0])) @ v, torch.tensor([0.0, 1.0]))
    assert nowhere.converged
    assert nowhere.singular_value == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_not_finite_gives_no_number(bad):
    calls = []

    def product(vector):
        calls.append(vector)
        return vector if len(calls) == 1 else vector * bad

    found = top_curvature(product, torch.tensor([1.0, 0.0]))
    assert (found.iterations, len(calls), found.converged) == (2, 2, False)
    assert math.isnan(found.singular_value)
    assert math.isnan(found.eigenvalue)


def test_the_graph_of_a_product_is_dropped():
    factor = torch.ones((), requires_grad=True)
    found = top_curvature(lambda v: factor * v, torch.ones(3, requires_grad=True))
    assert not found.vector.requires_grad
    assert found.singular_value == pytest.approx(1)


@pytest.mark.parametrize(
    ("start", "options", "match"),
    [
        (torch.zeros(3), {}, "`start`"),
        (torch.tensor([1.0, math.nan]), {}, "`start`"),
        (torch.tensor([1.0, math.inf]), {}, "`start`"),
        (torch.ones(3), {"max_iterations": 0}, "`max_iterations`"),
        (torch.ones(3), {"tolerance": -1e-3}, "`tolerance`"),
    ],
)
def test_refuses_what_cannot_be_iterated(start, options, match):
    with pytest.raises(ValueError, match=match):
        top_curvature(lambda v: v, start, **options)


def test_the_estimators_are_the_papers_and_the_codes():
    positive = TopCurvature(9.0, 9.0, 3, True, torch.ones(1))
    negative = TopCurvature(9.0, -9.0, 3, True, torch.ones(1))
    assert curvature_estimate(positive) == curvature_estimate(negative) == 9.0
    assert curvature_estimate(positive, "sqrt_eigenvalue") == curvature_estimate(negative, "sqrt_eigenvalue") == 3.0
    assert math.isnan(curvature_estimate(TopCurvature(math.nan, math.nan, 1, False, torch.ones(1)), "sqrt_eigenvalue"))
    with pytest.raises(ValueError, match="'singular_value', 'sqrt_eigenvalue'"):
        curvature_estimate(positive, "trace")
