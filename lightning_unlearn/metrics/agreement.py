"""What every metric here does where several processes compute it: what one of them refuses, all of them raise."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any
from warnings import warn

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_unlearn.exceptions import LightningUnlearnError, UnlearningWarning, UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected, shorten

__all__ = ["AgreeingMetric"]


def _check_whole(given: Sequence[Any]) -> None:
    if any(isinstance(one, DTensor) for one in given):
        remedy = "Call its full_tensor() first, on every process."
        raise UnsupportedStrategyError(expected("outputs and targets", "whole tensors", "a DTensor", remedy))


class AgreeingMetric(Metric):
    """Lets no process wait for one whose data were refused.

    A process that raises in `update` never arrives at `compute`, where the others wait for it until their time-out. So
    among several processes a refused update adds nothing, is said by a warning, and is raised by `compute`: on the
    process in question its own error, on the others one that names it. In a single process, and with
    `sync_on_compute=False`, where nobody waits, it is raised at once.

    Outputs that are in pieces on several processes (DTensor) are refused by name; models that are, which metrics of
    weights take, are not.

    Args:
        kwargs: See :class:`torchmetrics.Metric`.
    """

    _refused: Exception | None = None

    def _no_value(self) -> Any:
        """What `forward` returns for a refused batch: NaN, in the form of the metric's value."""
        return torch.full((), math.nan, dtype=torch.float64, device=self.device)

    def _is_waited_for(self) -> bool:
        available = self.distributed_available_fn
        if not self.sync_on_compute or not callable(available) or not available() or not dist.is_initialized():
            return False
        return dist.get_world_size(self.process_group) > 1

    def _refuse(self, error: Exception) -> None:
        if self._refused is None:
            # Without its frames, which would keep the batch.
            self._refused = error.with_traceback(None)
            warn(
                f"{type(self).__name__} refused an update, and `compute` raises it on every process: {error}",
                UnlearningWarning,
                stacklevel=3,
            )

    def _wrap_update(self, update: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(update)
        def agreeing(*args: Any, **kwargs: Any) -> None:
            try:
                _check_whole((*args, *kwargs.values()))
                update(*args, **kwargs)
            except Exception as error:
                if not self._is_waited_for():
                    raise
                self._refuse(error)

        return super()._wrap_update(agreeing)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and return its own value; see :meth:`torchmetrics.Metric.forward`."""
        earlier = self._refused  # which a batch's own value would reset
        try:
            value = super().__call__(*args, **kwargs)
        except Exception as error:
            if not self._is_waited_for():
                raise
            self._to_sync, self._should_unsync = self.sync_on_compute, True  # which torchmetrics leaves off
            self._refuse(error)
        if self._refused is not None:
            value = self._forward_cache = self._no_value()
        self._refused = self._refused if earlier is None else earlier
        return value

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        """Gather the states, unless a process has refused an update."""
        group, own = process_group or self.process_group, self._refused
        described: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(described, None if own is None else f"{type(own).__name__}: {own}", group=group)
        failed = {rank: text for rank, text in enumerate(described) if text is not None}
        if failed:
            self._cache = None
            if own is not None:
                raise own
            rule, remedy = "accepted on every process", next(iter(failed.values()))
            got = f"refused on {shorten([f'process {rank}' for rank in failed])}"
            raise LightningUnlearnError(expected(f"updates of {type(self).__name__}", rule, got, remedy))
        super()._sync_dist(dist_sync_fn, process_group)

    def reset(self) -> None:
        """Forget everything that was added, and what was refused."""
        self._refused = None
        super().reset()
