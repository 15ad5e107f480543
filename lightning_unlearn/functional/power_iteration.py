"""The largest curvature of a loss, from products with its Hessian alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import check_choice, check_positive, check_positive_int, expected

__all__ = ["CurvatureEstimator", "TopCurvature", "curvature_estimate", "top_curvature"]

CurvatureEstimator: TypeAlias = Literal["singular_value", "sqrt_eigenvalue"]
"""Which number stands for the curvature in an unlearning error."""


@dataclass(frozen=True, slots=True)
class TopCurvature:
    r"""What `top_curvature` found.

    Attributes:
        singular_value: :math:`\lVert H v \rVert`, never above the largest :math:`|\lambda|`; NaN where a product was
            not finite.
        eigenvalue: Rayleigh quotient :math:`v^T H v`, negative where negative curvature dominates. Where both signs are
            equally large it lies anywhere between them: clearly smaller in size than the singular value, it says so,
            or that the iteration was ended early.
        iterations: Products that were taken.
        converged: Whether the singular value changed by no more than the tolerance in the last one.
        vector: The unit vector `v` that both numbers are of.
    """

    singular_value: float
    eigenvalue: float
    iterations: int
    converged: bool
    vector: Tensor


def top_curvature(
    product: Callable[[Tensor], Tensor], start: Tensor, *, max_iterations: int = 100, tolerance: float = 1e-3
) -> TopCurvature:
    r"""Largest singular value of a symmetric operator that is known by its products, by power iteration.

    What is followed is :math:`\sigma = \lVert H v \rVert`. It grows with every iteration up to the largest
    :math:`|\lambda|` that `start` has a part of, also where :math:`+\lambda` and :math:`-\lambda` are equally large and
    `v` never settles. So an iteration that ends early gives a value that is too small, never one too large. A start
    without any part along the top direction finds the largest among the others: draw it at random.

    The defaults are those of the code that Thudi et al. 2021 (arXiv 2109.13398) measure with (PyHessian). That follows
    the Rayleigh quotient instead, which for a tie of signs stops anywhere between the two.

    Args:
        product: Flat vector -> operator times it. A graph on the result is dropped.
        start: Flat vector, not zero; its dtype and device are those of the iteration.
        max_iterations: Products at most.
        tolerance: Relative change of the singular value that ends it earlier, at least 0.

    Returns:
        The last estimate. An operator that maps `v` to zero has converged at 0. A product that is not finite ends the
        iteration with NaN for both numbers, not converged.

    Raises:
        ValueError: `start` is zero or not finite, or an argument is out of range.

    >>> matrix = torch.diag(torch.tensor([1.0, -3.0]))
    >>> found = top_curvature(lambda v: matrix @ v, torch.ones(2), tolerance=1e-6)
    >>> round(found.singular_value, 4), round(found.eigenvalue, 4), found.converged
    (3.0, -3.0, True)
    """
    check_positive_int("max_iterations", max_iterations)
    check_positive("tolerance", tolerance, zero=True)
    start = start.detach()
    length = float(torch.linalg.vector_norm(start))
    if not (math.isfinite(length) and length > 0):
        raise ValueError(expected("start", "a vector of positive and finite length", length, "Draw it at random."))
    following, sigma, done, converged = start / length, math.nan, 0, False
    while done < max_iterations and not converged:
        vector, image, previous = following, product(following).detach(), sigma
        sigma, eigenvalue = float(torch.linalg.vector_norm(image)), float(vector @ image)
        done += 1
        if not math.isfinite(sigma):
            return TopCurvature(math.nan, math.nan, done, False, vector)
        # A vector that is mapped to zero has nowhere to go.
        converged = sigma == 0 or abs(sigma - previous) <= tolerance * sigma
        following = following if converged else image / sigma
    return TopCurvature(sigma, eigenvalue, done, converged, vector)


def curvature_estimate(top: TopCurvature, estimator: CurvatureEstimator = "singular_value") -> float:
    r"""The number that an unlearning error takes for the curvature.

    Args:
        top: What was found.
        estimator: `"singular_value"` as the paper writes; or `"sqrt_eigenvalue"` as the authors' code computes, the
            root of the eigenvalue of largest size. That code has no number where the eigenvalue is negative; here it
            is :math:`\sqrt{|\lambda|}`, equal to theirs wherever theirs is a number.

    Raises:
        ValueError: unknown estimator.

    >>> top = TopCurvature(4.0, -4.0, 9, True, torch.ones(1))
    >>> curvature_estimate(top), curvature_estimate(top, "sqrt_eigenvalue")
    (4.0, 2.0)
    """
    check_choice("estimator", estimator, get_args(CurvatureEstimator))
    return top.singular_value if estimator == "singular_value" else math.sqrt(abs(top.eigenvalue))
