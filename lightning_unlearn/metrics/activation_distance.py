"""`ActivationDistance`: how far the probabilities of a model are from those of the retrained one."""

from __future__ import annotations

from typing import Any, ClassVar, get_args

from torch import Tensor

from lightning_unlearn.functional.divergences import DistanceNorm, activation_distance
from lightning_unlearn.metrics.sample_means import MeanOverSamples
from lightning_unlearn.results import Target
from lightning_unlearn.utilities.checks import check_choice

__all__ = ["ActivationDistance"]


class ActivationDistance(MeanOverSamples):
    """Mean distance between the softmax outputs of model and reference; 0 is best.

    Two independent retrainings are not at 0 either: their distance is the noise to compare with. See
    :func:`lightning_unlearn.functional.divergences.activation_distance`. Computed in float64 whatever comes in.

    Args:
        norm: `"l2"` (Chundawat et al. 2023, arXiv 2205.08096) or `"l1"` (Golatkar et al. 2020, arXiv 1911.04933).
        kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        ValueError: the norm is neither.

    >>> import torch
    >>> metric = ActivationDistance(norm="l1")
    >>> metric.update(torch.tensor([[0.0, -torch.inf]]), reference_logits=torch.tensor([[0.0, 0.0]]))
    >>> metric.compute()
    tensor(1., dtype=torch.float64)
    """

    target: ClassVar[Target] = "low"

    def __init__(self, *, norm: DistanceNorm = "l2", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm: DistanceNorm = check_choice("norm", norm, get_args(DistanceNorm))

    def update(self, logits: Tensor, reference_logits: Tensor) -> None:
        """Add the outputs of both models, each (N, C), for the same samples in the same order."""
        self.add(activation_distance(logits, reference_logits, norm=self.norm))
