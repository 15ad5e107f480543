"""Losses against the answers of teachers, differentiable in the student's logits."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from lightning_unlearn.utilities.checks import check_choice, check_fraction, check_positive, expected

__all__ = ["DistillationReduction", "distillation_loss", "mixed_teacher_loss"]

DistillationReduction: TypeAlias = Literal["batchmean", "official"]
"""Mean over samples, as in textbooks, or over samples and classes, which divides by the number of classes again."""


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, multi_label: bool = False
) -> Tensor:
    r"""Mean divergence of a student from its teacher (Hinton et al. 2015), in nats.

    .. math:: T^2 \; \mathrm{mean} \; KL(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(z / T))

    The factor :math:`T^2` keeps the size of gradients the same for every temperature.

    Args:
        logits: z, of shape (N, C, ...).
        teacher_logits: t, same shape; a constant, no gradient flows into it. A class may be excluded by -inf.
        temperature: T.
        multi_label: Whether entries are logits of independent yes/no questions: then the mean is over all of them.

    Returns:
        A scalar; the mean is over samples, and over positions where there are more dimensions.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    >>> distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]]))
    tensor(0.6931)
    """
    heat = check_positive("temperature", temperature)
    log_q, log_p = _log_answers(logits, teacher_logits.detach(), heat, multi_label)
    return heat**2 * _relative_entropy(log_p.exp(), log_p, log_q).mean()


def mixed_teacher_loss(
    logits: Tensor,
    incompetent_logits: Tensor,
    competent_logits: Tensor,
    *,
    share: float,
    temperature: float = 1.0,
    reduction: DistillationReduction = "batchmean",
    multi_label: bool = False,
) -> Tensor:
    r"""Divergence of a student from a mixture of two teachers (Chundawat et al. 2023), in nats.

    .. math:: KL(l \, \mathrm{softmax}(d / T) + (1 - l) \, \mathrm{softmax}(s / T) \,\|\, \mathrm{softmax}(z / T))

    without a factor :math:`T^2`.

    Args:
        logits: z, of shape (N, C, ...).
        incompetent_logits: d, same shape; a constant.
        competent_logits: s, same shape; a constant.
        share: l, from 0 to 1: the incompetent teacher's share.
        temperature: T.
        reduction: See `DistillationReduction`.
        multi_label: As in `distillation_loss`, where `reduction` makes no difference.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ, or a number is out of range.

    >>> even, sure = torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]])
    >>> mixed_teacher_loss(even, even, sure, share=0.0), mixed_teacher_loss(even, even, sure, share=1.0)
    (tensor(0.6931), tensor(0.))
    """
    heat = check_positive("temperature", temperature)
    share = check_fraction("share", share, zero=True)
    check_choice("reduction", reduction, ("batchmean", "official"))
    log_q, log_d = _log_answers(logits, incompetent_logits.detach(), heat, multi_label)
    _, log_s = _log_answers(logits, competent_logits.detach(), heat, multi_label)
    target = share * log_d.exp() + (1.0 - share) * log_s.exp()
    loss = _relative_entropy(target, target.log(), log_q).mean()
    return loss / logits.shape[1] if reduction == "official" and not multi_label else loss


def _log_answers(logits: Tensor, reference: Tensor, heat: float, multi_label: bool) -> tuple[Tensor, Tensor]:
    if logits.ndim < 2 or logits.shape != reference.shape:
        rule = f"of the shape of `logits`, (N, C, ...), here {tuple(logits.shape)}"
        raise ValueError(expected("teacher_logits", rule, tuple(reference.shape)))

    def log_answer(given: Tensor) -> Tensor:
        # Half precision has too few digits for small divergences.
        scaled = (given.float() if given.dtype in (torch.float16, torch.bfloat16) else given) / heat
        if multi_label:  # a question is a distribution over yes and no
            return torch.stack((functional.logsigmoid(scaled), functional.logsigmoid(-scaled)), 1)
        return scaled.log_softmax(1)

    return log_answer(logits), log_answer(reference)


def _relative_entropy(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over dimension 1; a class that p excludes adds nothing, neither to the value nor to gradients."""
    excluded = p == 0
    return (p * (log_p.masked_fill(excluded, 0.0) - log_q.masked_fill(excluded, 0.0))).sum(1)
