"""How far the outputs of a model are from those of a reference model, sample by sample."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import check_choice, expected

__all__ = [
    "DistanceNorm",
    "ZRFForm",
    "activation_distance",
    "js_to_reference",
    "kl_to_reference",
    "zero_retrain_forgetting",
]

DistanceNorm: TypeAlias = Literal["l2", "l1"]
"""Euclidean length of a difference, or the sum of its absolute entries."""

ZRFForm: TypeAlias = Literal["textbook", "official"]
"""The Jensen-Shannon divergence as it is defined, or what the authors' code computes."""


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


def activation_distance(logits: Tensor, reference_logits: Tensor, *, norm: DistanceNorm = "l2") -> Tensor:
    r"""Distance between the probabilities of model and reference per sample, :math:`\lVert p_u - p_g \rVert`.

    Called activation distance in the literature, where the activations are those of the last layer behind the softmax.
    It is 0 exactly where both distributions agree, and at most the root of 2 (`"l2"`) or 2 (`"l1"`, twice the total
    variation).

    Source: `"l2"` as in the code of Chundawat et al. 2023 (arXiv 2205.08096), `"l1"` as in that of Golatkar et al. 2020
    (arXiv 1911.04933); both take the mean over samples.

    Args:
        logits: Outputs of the model, (N, C), any floating dtype; log-probabilities will do.
        reference_logits: Outputs of the reference, same shape, for the same samples in the same order.
        norm: `"l2"` or `"l1"`.

    Returns:
        float64 of shape (N,), computed in float64 whatever comes in.

    Raises:
        ValueError: the shapes differ or are not (N, C), or the norm is neither.

    >>> left, right = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    >>> activation_distance(left, right), activation_distance(left, right, norm="l1")
    (tensor([1.4142], dtype=torch.float64), tensor([2.], dtype=torch.float64))
    """
    check_choice("norm", norm, get_args(DistanceNorm))
    log_p, log_q = _log_probabilities(logits, reference_logits)
    difference = log_p.exp() - log_q.exp()
    return difference.abs().sum(dim=-1) if norm == "l1" else difference.square().sum(dim=-1).sqrt()


def zero_retrain_forgetting(logits: Tensor, incompetent_logits: Tensor, *, form: ZRFForm = "textbook") -> Tensor:
    r"""ZRF of Chundawat et al. 2023 per sample: one minus the divergence from a model that was never trained.

    The authors compare with the "incompetent teacher", a network of the same kind with random weights, so that no
    retrained model is needed. Between 1 - ln 2 and 1, in nats, in the textbook form. A value of 1 is *not* the aim: it
    belongs to a model that answers at random. The right value is that of the retrained model, against the same teacher.

    Args:
        logits: Outputs of the model, (N, C), any floating dtype; log-probabilities will do.
        incompetent_logits: Outputs of the untrained model, same shape, for the same samples in the same order.
        form: `"textbook"` for :math:`1 - \tfrac12 KL(p\|m) - \tfrac12 KL(q\|m)` with :math:`m = (p + q) / 2`.
            `"official"` for what the authors' code returns, for comparison with numbers from it: its calls of `kl_div`
            have the sides exchanged and divide by the number of classes as well as of samples, which makes
            :math:`1 - (KL(m\|p) + KL(m\|q)) / 2C`, much nearer to 1 and without a lower bound.

    Returns:
        float64 of shape (N,); the score is the mean.

    Raises:
        ValueError: the shapes differ or are not (N, C), or the form is neither.

    >>> left, right = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    >>> zero_retrain_forgetting(left, right)
    tensor([0.3069], dtype=torch.float64)
    """
    if check_choice("form", form, get_args(ZRFForm)) == "textbook":
        return 1 - js_to_reference(logits, incompetent_logits)
    log_p, log_q = _log_probabilities(logits, incompetent_logits)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 1 - (_relative_entropy(log_m, log_p) + _relative_entropy(log_m, log_q)) / (2 * logits.shape[1])
