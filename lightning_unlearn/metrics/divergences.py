"""Divergence of a model's outputs from a reference model's, as torchmetrics metrics."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_unlearn.functional.divergences import js_to_reference, kl_to_reference
from lightning_unlearn.results import Target

__all__ = ["JSToReference", "KLToReference"]


class _MeanDivergence(Metric):
    """Mean over samples of a per-sample divergence; samples weigh the same whatever batch or process they came in."""

    is_differentiable: bool = False
    higher_is_better: bool = False
    full_state_update: bool = False
    target: ClassVar[Target] = "low"

    total: Tensor
    samples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @staticmethod
    @abstractmethod
    def divergence(logits: Tensor, reference_logits: Tensor) -> Tensor:
        """Per-sample values, (N,)."""

    def update(self, logits: Tensor, reference_logits: Tensor) -> None:
        """Add the outputs of both models, each (N, C), for the same samples in the same order."""
        values = self.divergence(logits, reference_logits)
        self.total += values.sum().to(self.total)
        self.samples += values.numel()

    def compute(self) -> Tensor:
        """Mean over all samples, a scalar in nats; NaN before the first sample."""
        return self.total / self.samples

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)


class KLToReference(_MeanDivergence):
    """Mean KL(reference || model) in nats; 0 is best, and two independent retrainings are not at 0 either.

    See :func:`lightning_unlearn.functional.divergences.kl_to_reference`.

    >>> metric = KLToReference()
    >>> metric.update(torch.tensor([[0.0, 0.0]]), reference_logits=torch.tensor([[0.0, -torch.inf]]))
    >>> metric.compute()
    tensor(0.6931, dtype=torch.float64)
    """

    divergence = staticmethod(kl_to_reference)


class JSToReference(_MeanDivergence):
    """Mean Jensen-Shannon divergence between model and reference in nats: between 0 and ln 2, symmetric.

    See :func:`lightning_unlearn.functional.divergences.js_to_reference`.

    >>> metric = JSToReference()
    >>> metric.update(torch.tensor([[0.0, -torch.inf]]), reference_logits=torch.tensor([[-torch.inf, 0.0]]))
    >>> metric.compute()
    tensor(0.6931, dtype=torch.float64)
    """

    divergence = staticmethod(js_to_reference)
