"""Exact selection of the largest magnitudes on a device, without the host ever waiting for a number.

Everything has a shape that is known beforehand: `k` places for positions and values, and a count of how many of them
are used. So all of it can be queued on a stream, and be read much later.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["largest_packed"]


def largest_packed(
    difference: Tensor, k: int, positions: Tensor, values: Tensor, count: Tensor, squares: Tensor | None = None
) -> None:
    """Write the `k` entries of largest magnitude, in order, into given places; of equal ones the lowest position wins.

    Exact for finite input, also with ties; a zero is never kept. For other input the result means nothing: whether
    all entries are finite is for the caller to look at.

    Args:
        difference: float32 of shape (n,).
        k: How many to keep, from 1 to n.
        positions: Integers of shape (k,); unused places at the end become -1.
        values: float32 of shape (k,); unused places at the end are undefined.
        count: Integer scalar: how many places are used.
        squares: float64 of shape (2,), to which the sums of squares of what is dropped, and of everything, are added.

    >>> places, values, count = torch.empty(2, dtype=torch.int32), torch.empty(2), torch.empty((), dtype=torch.int64)
    >>> largest_packed(torch.tensor([1.0, -3.0, 0.0, 3.0]), 2, places, values, count)
    >>> places, values, count
    (tensor([1, 3], dtype=torch.int32), tensor([-3.,  3.]), tensor(2))
    """
    magnitude = difference.abs()
    threshold = torch.topk(magnitude, k, sorted=False).values.amin()
    above = magnitude > threshold
    equal = (magnitude == threshold).logical_and_(threshold > 0)
    mask = above | (equal & (equal.cumsum(0) <= k - above.sum()))
    found = torch.nonzero_static(mask, size=k, fill_value=-1).view(-1)
    positions.copy_(found)
    torch.index_select(difference, 0, found.clamp_min_(0), out=values)
    count.copy_(mask.sum())
    if squares is not None:
        dropped = torch.linalg.vector_norm(difference.masked_fill(mask, 0.0), dtype=torch.float64).square()
        total = torch.linalg.vector_norm(difference, dtype=torch.float64).square()
        squares.add_(torch.stack((dropped, total)))
