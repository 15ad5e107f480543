"""Sums over the processes that record together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["GroupReductions"]


class GroupReductions:
    """Reductions over the processes of a group; see `functional.shard_selection.Reductions`.

    Args:
        device: Where the backend reduces; what is elsewhere (offloaded parameters) is copied there and back.
        group: The group; by default all processes.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self._device = device
        self._group = group

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, entry by entry; `values` may be overwritten by it."""
        here = values.to(self._device)
        dist.all_reduce(here, group=self._group)
        return here.to(values.device)

    def before(self, values: Tensor) -> Tensor:
        """The sum over the processes of lower rank, entry by entry."""
        here = values.to(self._device)
        everyone = [torch.empty_like(here) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(everyone, here, group=self._group)
        return torch.stack(everyone)[: dist.get_rank(self._group)].sum(0).to(values)
