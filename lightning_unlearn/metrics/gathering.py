"""Gathering of metric states from processes of which some have seen nothing."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_unlearn.utilities.checks import expected

__all__ = ["gather_uneven"]


def gather_uneven(result: Tensor, group: Any | None = None, *, ragged: bool = False) -> list[Tensor]:
    """Gather a state from all processes; an empty one takes the dtype and the trailing shape of the others.

    torchmetrics stands in for an empty list state with a float vector. Where the others hold integer targets or rows
    of probabilities, its gathering then aborts the process. Splits make that case an ordinary one: a process
    that was dealt no sample of the forget set is common.

    Args:
        result: This process's state.
        group: Process group, by default all processes.
        ragged: Whether rows may differ in size, as in a metric that does not put them together.

    Returns:
        The states in the order of the processes.

    Raises:
        ValueError: on every process: another number of dimensions or dtype, or, unless `ragged`, rows of another size,
            as of models with more or fewer classes.
    """
    described: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(described, (result.dtype, tuple(result.shape)), group=group)
    filled = [(dtype, shape) for dtype, shape in described if not shape or shape[0] > 0]
    if len({(dtype, len(shape), () if ragged else shape[1:]) for dtype, shape in filled}) > 1:
        rule, remedy = "alike on every process", "Classes, samples of a model and dtype have to agree."
        raise ValueError(expected("the shape of a metric's state", rule, [shape for _, shape in described], remedy))
    if result.numel() == 0 and filled and filled[0][1]:
        dtype, shape = filled[0]
        result = result.new_empty((0, *shape[1:]), dtype=dtype)
    return list(gather_all_tensors(result, group))
