"""What metrics of single samples have in common: a mean in which every sample weighs the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.metrics.agreement import AgreeingMetric

__all__ = ["MeanOverSamples"]


class MeanOverSamples(AgreeingMetric):
    """Mean over samples of a number that every update computes for each of its own.

    The state is a sum in float64 and a count, so a sample weighs the same whatever batch or process it came in.

    Args:
        kwargs: See :class:`torchmetrics.Metric`.
    """

    is_differentiable: bool = False
    higher_is_better: bool = False
    full_state_update: bool = False

    total: Tensor
    samples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Add the values of some samples, (N,)."""
        self.total += values.sum().to(self.total)
        self.samples += values.numel()

    def compute(self) -> Tensor:
        """Mean over all samples, a float64 scalar; NaN before the first sample."""
        return self.total / self.samples

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
