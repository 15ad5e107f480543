"""Divergence of a model's outputs from a reference model's, as torchmetrics metrics."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from lightning_unlearn.functional.divergences import js_to_reference, kl_to_reference
from lightning_unlearn.metrics.sample_means import MeanOverSamples
from lightning_unlearn.results import Target

__all__ = ["JSToReference", "KLToReference"]


class _MeanDivergence(MeanOverSamples):
    """Mean over samples of a per-sample divergence, in nats."""

    target: ClassVar[Target] = "low"

    @staticmethod
    @abstractmethod
    def divergence(logits: Tensor, reference_logits: Tensor) -> Tensor:
        """Per-sample values, (N,)."""

    def update(self, logits: Tensor, reference_logits: Tensor) -> None:
        """Add the outputs of both models, each (N, C), for the same samples in the same order."""
        self.add(self.divergence(logits, reference_logits))


class KLToReference(_MeanDivergence):
    """Mean KL(reference || model) in nats; 0 is best, and two independent retrainings are not at 0 either.

    See :func:`lightning_unlearn.functional.divergences.kl_to_reference`.

    >>> import torch
    >>> metric = KLToReference()
    >>> metric.update(torch.tensor([[0.0, 0.0]]), reference_logits=torch.tensor([[0.0, -torch.inf]]))
    >>> metric.compute()
    tensor(0.6931, dtype=torch.float64)
    """

    divergence = staticmethod(kl_to_reference)


class JSToReference(_MeanDivergence):
    """Mean Jensen-Shannon divergence between model and reference in nats: between 0 and ln 2, symmetric.

    See :func:`lightning_unlearn.functional.divergences.js_to_reference`.

    >>> import torch
    >>> metric = JSToReference()
    >>> metric.update(torch.tensor([[0.0, -torch.inf]]), reference_logits=torch.tensor([[-torch.inf, 0.0]]))
    >>> metric.compute()
    tensor(0.6931, dtype=torch.float64)
    """

    divergence = staticmethod(js_to_reference)
