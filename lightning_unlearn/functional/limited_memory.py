r"""The Hessian from a few pairs of changes of weights and gradients: L-BFGS in compact form (Byrd et al. 1994)."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import check_positive_int, expected

__all__ = ["LimitedMemoryHessian"]


class LimitedMemoryHessian:
    r"""Products with the BFGS approximation of a Hessian (not of its inverse), from its last pairs.

    :math:`B v = \tau v - [\tau S, Y] \begin{pmatrix} \tau S^T S & L \\ L^T & -D \end{pmatrix}^{-1} [\tau S, Y]^T v`
    with the changes of weights :math:`S`, those of gradients :math:`Y`, the strictly lower triangle :math:`L` of
    :math:`S^T Y` and its diagonal :math:`D`. The matrix is positive definite, as only pairs with
    :math:`s^T y > 0` are taken, and :math:`\tau = s^T y / s^T s` of the newest.

    Args:
        history: Pairs that are kept.

    Raises:
        ValueError: no pair can be kept.

    >>> hessian = LimitedMemoryHessian(history=2)
    >>> hessian.add(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0]))
    True
    >>> hessian.times(torch.tensor([2.0, 0.0]))
    tensor([6., 0.])
    """

    def __init__(self, history: int) -> None:
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=check_positive_int("history", history))

    def __len__(self) -> int:
        return len(self._pairs)

    def add(self, change: Tensor, response: Tensor) -> bool:
        """Take a pair, unless it shows no positive curvature; returns whether it was taken.

        Args:
            change: Of the weights.
            response: Of the gradient.
        """
        curvature = float(change @ response)
        # Below rounding a sign says nothing.
        least = torch.finfo(change.dtype).eps * float(change.norm()) * float(response.norm())
        if not curvature > least:
            return False
        self._pairs.append((change, response))
        return True

    def times(self, vector: Tensor) -> Tensor:
        """The matrix times a vector; pairs that the others make redundant, the oldest first, are left out.

        Raises:
            ValueError: there is no pair.
        """
        if not self._pairs:
            raise ValueError(expected("pairs", "at least one", 0, "Add one first."))
        pairs = list(self._pairs)
        while True:
            found = self._product(pairs, vector)
            if found is not None:
                return found
            pairs = pairs[1:]

    def _product(self, pairs: list[tuple[Tensor, Tensor]], vector: Tensor) -> Tensor | None:
        s, y = (torch.stack(part, dim=1) for part in zip(*pairs, strict=True))
        newest_s, newest_y = pairs[-1]
        tau = newest_s @ newest_y / (newest_s @ newest_s)
        across = s.T @ y
        lower, diagonal = across.tril(-1), across.diagonal().diag()
        middle = torch.cat([torch.cat([tau * (s.T @ s), lower], 1), torch.cat([lower.T, -diagonal], 1)])
        sides = torch.cat([tau * s, y], 1)
        solved, info = torch.linalg.solve_ex(middle, sides.T @ vector)
        if int(info) != 0 and len(pairs) > 1:
            return None
        found: Tensor = tau * vector - sides @ solved
        return found
