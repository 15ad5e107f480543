"""Gathering of metric states from processes of which some have seen nothing."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

__all__ = ["gather_uneven"]


def gather_uneven(result: Tensor, group: Any | None = None) -> list[Tensor]:
    """Gather a state from all processes; an empty one takes the dtype and the trailing shape of the others.

    torchmetrics stands in for an empty list state with a float vector. Where the others hold integer targets or rows
    of probabilities, its gathering then aborts the process. Splits make that case an ordinary one: a process
    that was dealt no sample of the forget set is common.

    Args:
        result: This process's state.
        group: Process group, by default all processes.

    Returns:
        The states in the order of the processes.
    """
    described: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(described, (result.dtype, tuple(result.shape)), group=group)
    if result.numel() == 0:
        filled = [(dtype, shape) for dtype, shape in described if shape and shape[0] > 0]
        if filled:
            dtype, shape = filled[0]
            result = result.new_empty((0, *shape[1:]), dtype=dtype)
    return list(gather_all_tensors(result, group))
