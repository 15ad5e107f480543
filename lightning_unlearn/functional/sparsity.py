"""The L1 norm of weights, and a coefficient that fades out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_unlearn.utilities.sharded import global_sums, local_part

__all__ = ["fading", "l1_norm"]


def l1_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the magnitudes of all entries, differentiable (with gradient 0 at 0); 0 of nothing.

    Sharded tensors (`DTensor`) give the sum of the whole on every process, by one small all-reduce, so every process
    has to call this; the gradient is that of each process's own entries.

    >>> l1_norm([torch.tensor([1.0, -2.0]), torch.tensor(0.5)])
    tensor(3.5000)
    """
    given = list(tensors)
    own = [local_part(tensor).abs().sum() for tensor in given]
    total: Tensor | None = None
    for tensor, one, whole in zip(given, own, global_sums(own, given), strict=True):
        if isinstance(tensor, DTensor):
            one = one + (whole - one.detach())  # the value of the whole, with the gradient of this process's part
        total = one if total is None else total + one.to(total.device)
    return torch.zeros(()) if total is None else total


def fading(start: float, position: int, length: int, rest: int = 0) -> float:
    """A value that falls linearly from `start` and is 0 for the last `rest` of `length` positions.

    Constant where `rest` is the whole length, which is a rule of the official code of l1-sparse.

    Args:
        start: Value at position 0.
        position: From 0; at `length` and beyond it is 0.
        length: Number of positions.
        rest: How many of them have 0.

    >>> [fading(1.0, position, 5, rest=1) for position in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    >>> fading(1.0, 1, 2, rest=2)
    1.0
    """
    if rest == length:
        return start
    steps = length - rest
    return start * (1.0 - position / steps) if position < steps else 0.0
