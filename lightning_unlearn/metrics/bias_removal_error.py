"""`BiasRemovalError`: the share of wrong labels of the forget set that a model still answers with."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_unlearn.functional.bias_removal import bias_removal_error
from lightning_unlearn.metrics.sample_means import MeanOverSamples
from lightning_unlearn.results import Target

__all__ = ["BiasRemovalError"]


class BiasRemovalError(MeanOverSamples):
    """Share of the forget set that is still given the wrong labels it was trained with; the goal is 0.

    The goal of Alon and Dar 2025 (arXiv 2503.08633) in this package's reading; see
    :func:`lightning_unlearn.functional.bias_removal.bias_removal_error`, also for what a retrained model has here.

    Args:
        kwargs: See :class:`torchmetrics.Metric`.

    >>> import torch
    >>> metric = BiasRemovalError()
    >>> metric.update(torch.tensor([1, 0, 2, 0]), given_targets=torch.tensor([1, 1, 1, 1]))
    >>> metric.compute()
    tensor(0.2500, dtype=torch.float64)
    """

    target: ClassVar[Target] = "low"

    def update(self, outputs: Tensor, given_targets: Tensor) -> None:
        """Add answers to samples of the forget set, (N, C) or (N,), and the labels they were trained with, (N,)."""
        self.add(bias_removal_error(outputs, given_targets))
