"""Gradients as flat vectors, diagonal and full curvature matrices, and how to solve with them without forming them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import check_positive_int, expected

__all__ = [
    "RankOneInverse",
    "Solution",
    "conjugate_gradients",
    "fisher_product",
    "flat_gradient",
    "gradient_and_product",
    "hessian_product",
    "label_fisher",
    "unflatten",
]


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a flat vector into pieces of the shapes of some tensors.

    >>> [piece.tolist() for piece in unflatten(torch.arange(3), [torch.zeros(2, 1), torch.zeros(())])]
    [[[0], [1]], 2]
    """
    pieces = torch.split(vector, [one.numel() for one in like])
    return [piece.view(one.shape) for piece, one in zip(pieces, like, strict=True)]


def flat_gradient(
    output: Tensor, parameters: Sequence[Tensor], *, weights: Tensor | None = None, keep_graph: bool = False
) -> Tensor:
    """Gradient of `output` (of its product with `weights`, where it is no scalar) as one flat vector.

    Args:
        output: What is differentiated.
        parameters: By what, in this order; those that `output` does not depend on have gradient zero.
        weights: As the shape of `output`.
        keep_graph: Whether `output` is differentiated again afterwards.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> flat_gradient((w * w).sum(), [w])
    tensor([2., 4.])
    """
    if not output.requires_grad:  # all the parameters behind it are frozen, or none is behind it
        return torch.cat([torch.zeros_like(one).flatten() for one in parameters])
    found = torch.autograd.grad(
        output, parameters, weights, retain_graph=keep_graph, allow_unused=True, materialize_grads=True
    )
    return torch.cat([one.flatten() for one in found])


def hessian_product(loss: Tensor, parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """The Hessian of `loss` times a flat vector, by two backward passes.

    Args:
        loss: Scalar, twice differentiable.
        parameters: Which the Hessian is of.
        vector: Flat, as long as all parameters together.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian_product(w[0] ** 2 * w[1], [w], torch.tensor([1.0, 0.0]))
    tensor([4., 2.])
    """
    return gradient_and_product(loss, parameters, vector)[1]


def gradient_and_product(loss: Tensor, parameters: Sequence[Tensor], vector: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `loss` and its Hessian times a flat vector, as `hessian_product`, from one forward pass.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> gradient_and_product(w[0] ** 2 * w[1], [w], torch.tensor([1.0, 0.0]))
    (tensor([4., 1.]), tensor([4., 2.]))
    """
    slopes = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    pieces = unflatten(vector, parameters)
    along = torch.stack([(slope * piece).sum() for slope, piece in zip(slopes, pieces, strict=True)]).sum()
    return torch.cat([slope.detach().flatten() for slope in slopes]), flat_gradient(along, parameters)


def fisher_product(logits: Tensor, parameters: Sequence[Tensor], vector: Tensor, *, binary: bool = False) -> Tensor:
    r"""The Fisher information of the model's own answers times a flat vector: :math:`J^T A J v`.

    J is the Jacobian of the logits, and A the covariance of the gradient by the logits when labels are drawn from the
    model, divided by the number of answers: :math:`diag(p) - p p^T` for classes. That is the Gauss-Newton part of the
    Hessian of the mean cross-entropy, whole where the logits are linear in the parameters, and never negative.

    Args:
        logits: (N, C, ...), twice differentiable.
        parameters: Which the matrix is of.
        vector: Flat, as long as all parameters together.
        binary: Whether each logit is a decision of its own (multi-label).

    >>> w = torch.zeros(2, requires_grad=True)
    >>> fisher_product(w.view(1, 2), [w], torch.tensor([1.0, 0.0]))
    tensor([ 0.2500, -0.2500])
    """
    weights = torch.zeros_like(logits, requires_grad=True)
    slopes = torch.autograd.grad(
        logits, parameters, weights, create_graph=True, allow_unused=True, materialize_grads=True
    )
    pieces = unflatten(vector, parameters)
    along = torch.stack([(slope * piece).sum() for slope, piece in zip(slopes, pieces, strict=True)]).sum()
    # The gradient is linear in the weights of the logits, so its derivative by them is J v.
    tangent = torch.autograd.grad(along, weights, retain_graph=True)[0]
    with torch.no_grad():
        if binary:
            p = logits.sigmoid()
            curved = p * (1 - p) * tangent / logits.numel()
        else:
            p = logits.softmax(dim=1)
            curved = p * (tangent - (p * tangent).sum(dim=1, keepdim=True)) * (logits.shape[1] / logits.numel())
    return flat_gradient(logits, parameters, weights=curved)


def label_fisher(logits: Tensor, parameters: Sequence[Tensor], *, binary: bool = False) -> Tensor:
    r"""Diagonal of one sample's Fisher information, with the exact expectation over its label.

    :math:`\sum_y p(y|x) (\partial CE(x, y) / \partial \theta_i)^2`, one backward pass for each class.

    Args:
        logits: (1, C).
        parameters: Which the matrix is of.
        binary: Whether each logit is a decision of its own; their mean loss is what is differentiated then.

    Returns:
        Flat, non-negative.

    Raises:
        ValueError: another shape.

    >>> w = torch.zeros(2, requires_grad=True)
    >>> label_fisher(w.view(1, 2), [w])
    tensor([0.2500, 0.2500])
    """
    if logits.ndim != 2 or logits.shape[0] != 1:
        raise ValueError(expected("logits", "of one sample, of shape (1, C)", tuple(logits.shape)))
    answers = logits if binary else logits.log_softmax(dim=1)
    p = logits.detach().sigmoid() if binary else logits.detach().softmax(dim=1)
    chances = (p * (1 - p) / logits.numel() ** 2 if binary else p).flatten().tolist()
    total = torch.zeros(sum(one.numel() for one in parameters), dtype=logits.dtype, device=logits.device)
    for label, chance in enumerate(chances):
        total += chance * flat_gradient(answers[0, label], parameters, keep_graph=True).square()
    return total


@dataclass(frozen=True, slots=True)
class Solution:
    """What `conjugate_gradients` found.

    Attributes:
        vector: The solution.
        iterations: Products that were taken.
        residual: What is left of the right side, relative to it.
        curvature: The least curvature along a direction that was searched; not positive where the search ended there.
    """

    vector: Tensor
    iterations: int
    residual: float
    curvature: float


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, *, max_iterations: int = 50, tolerance: float = 1e-6
) -> Solution:
    """Solve a symmetric positive definite system that is known by its products alone.

    Args:
        product: Vector -> matrix times it.
        right: The right side.
        max_iterations: Products at most; fewer give a solution that is nearer to zero.
        tolerance: Residual, relative to the right side, that ends it earlier.

    Returns:
        The solution so far, also where a direction of no or negative curvature was met (see `Solution.curvature`).

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradients(lambda v: matrix @ v, torch.tensor([3.0, 4.0])).vector
    tensor([1.0000, 1.0000])
    """
    check_positive_int("max_iterations", max_iterations)
    found, rest = torch.zeros_like(right), right.clone()
    direction, squared, start = rest.clone(), float(rest @ rest), float(right @ right)
    least, done = float("inf"), 0
    while done < max_iterations and squared > tolerance**2 * start:
        step = product(direction)
        done += 1
        curvature = float(direction @ step)
        least = min(least, curvature / float(direction @ direction))
        if not curvature > 0:
            break
        length = squared / curvature
        found = found + length * direction
        rest = rest - length * step
        before, squared = squared, float(rest @ rest)
        direction = rest + squared / before * direction
    return Solution(found, done, (squared / start) ** 0.5 if start else 0.0, least)


class RankOneInverse:
    r"""The inverse of :math:`\lambda I + \frac{1}{n} \sum_k g_k g_k^T`, built one gradient at a time.

    Sherman and Morrison's recursion: with :math:`q_k = F_{k}^{-1} g_k`,
    :math:`F_{k+1}^{-1} u = F_k^{-1} u - q_k (q_k^T u) / (n + g_k^T q_k)`. Every `q_k` needs all the earlier ones, so
    they are kept: as many vectors as gradients.

    Args:
        damping: :math:`\lambda`, positive.
        n: Number of gradients that the mean is over.

    Raises:
        ValueError: one of them is not positive.

    >>> inverse = RankOneInverse(damping=1.0, n=1)
    >>> inverse.add(torch.tensor([1.0, 0.0]))
    >>> inverse.times(torch.tensor([1.0, 1.0]))
    tensor([0.5000, 1.0000])
    """

    def __init__(self, damping: float, n: int) -> None:
        if not damping > 0:
            raise ValueError(expected("damping", "a positive number", damping))
        self._damping = damping
        self._n = check_positive_int("n", n)
        self._columns: list[Tensor] = []
        self._divisors: list[float] = []

    def times(self, vector: Tensor) -> Tensor:
        """The inverse so far times a vector."""
        result = vector / self._damping
        for column, divisor in zip(self._columns, self._divisors, strict=True):
            result = result - column * (float(column @ vector) / divisor)
        return result

    def add(self, gradient: Tensor) -> None:
        """Take one more gradient in."""
        column = self.times(gradient)
        self._columns.append(column)
        self._divisors.append(self._n + float(gradient @ column))
