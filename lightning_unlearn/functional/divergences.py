"""How far the outputs of a model are from those of a reference model, sample by sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import expected

__all__ = ["js_to_reference", "kl_to_reference"]


def _log_probabilities(logits: Tensor, reference_logits: Tensor) -> tuple[Tensor, Tensor]:
    if logits.ndim != 2 or logits.shape != reference_logits.shape:
        raise ValueError(
            expected(
                "reference_logits",
                f"of the shape of `logits`, (N, C), here {tuple(logits.shape)}",
                tuple(reference_logits.shape),
                "Pass the outputs of both models for the same samples.",
            )
        )
    return logits.double().log_softmax(dim=-1), reference_logits.double().log_softmax(dim=-1)


def _relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats; a class that p excludes adds nothing, whatever q says."""
    excluded = log_p == -math.inf
    # Both logs may be -inf there, and -inf - -inf would poison the row with NaN before the mask could act.
    difference = log_p.masked_fill(excluded, 0.0) - log_q.masked_fill(excluded, 0.0)
    return (log_p.exp() * difference).sum(dim=-1).clamp_min(0.0)


def kl_to_reference(logits: Tensor, reference_logits: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence KL(reference || model) per sample, in nats.

    The reference is what the model should be (usually the retrained model), so an answer that the reference gives and
    the model does not is what costs. It is 0 exactly where both distributions agree, and unbounded.

    Args:
        logits: Outputs of the model, (N, C), any floating dtype; log-probabilities will do.
        reference_logits: Outputs of the reference, same shape, for the same samples in the same order.

    Returns:
        float64 of shape (N,), computed in float64 whatever comes in.

    Raises:
        ValueError: the shapes differ or are not (N, C).

    >>> half, sure = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]])
    >>> kl_to_reference(half, sure)
    tensor([0.6931], dtype=torch.float64)
    >>> kl_to_reference(sure, half)
    tensor([inf], dtype=torch.float64)
    """
    log_q, log_p = _log_probabilities(logits, reference_logits)
    return _relative_entropy(log_p, log_q)


def js_to_reference(logits: Tensor, reference_logits: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence between model and reference per sample, in nats (Lin 1991).

    The textbook form :math:`\tfrac12 KL(p\|m) + \tfrac12 KL(q\|m)` with :math:`m = (p + q) / 2`: symmetric, between 0
    and ln 2. Code that divides by the number of classes as well is not comparable with it.

    Args:
        logits: Outputs of the model, (N, C), any floating dtype.
        reference_logits: Outputs of the reference, same shape, for the same samples in the same order.

    Returns:
        float64 of shape (N,).

    Raises:
        ValueError: the shapes differ or are not (N, C).

    >>> js_to_reference(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]]))
    tensor([0.6931], dtype=torch.float64)
    """
    log_q, log_p = _log_probabilities(logits, reference_logits)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (_relative_entropy(log_p, log_m) + _relative_entropy(log_q, log_m))
