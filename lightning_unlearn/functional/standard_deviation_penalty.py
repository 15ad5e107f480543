r"""The standard-deviation penalty on logits, which keeps the changes of weights in a training small."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import check_choice, check_positive, expected

__all__ = ["PenaltyForm", "convert_gamma", "standard_deviation_penalty"]

PenaltyForm: TypeAlias = Literal["paper", "code"]
"""Whose unit gamma has: the paper's formula, or the authors' code, which divides by the number of classes once more."""

_EPSILON = 1e-12
"""Variance at which the root is rounded off, in squared units of the logits. Our choice; the code has none."""


def convert_gamma(gamma: float, n_classes: int, *, source: PenaltyForm, target: PenaltyForm) -> float:
    r"""Turn a gamma of one form into that of the other, exactly.

    The code takes the unbiased standard deviation and divides by the number of classes C as well, so
    :math:`\gamma_{paper} = \gamma_{code} \sqrt{C / (C - 1)} / C`. Which of the two units the gammas printed in the
    paper have is not known to us.

    Args:
        gamma: Weight of the penalty.
        n_classes: C, at least 2.
        source: Form that `gamma` is given in.
        target: Form that is wanted.

    Raises:
        ValueError: an argument is out of range.

    >>> round(convert_gamma(20.0, 10, source="code", target="paper"), 4)
    2.1082
    """
    for name, form in (("source", source), ("target", target)):
        check_choice(name, form, ("paper", "code"))
    check_positive("gamma", gamma, zero=True)
    if n_classes < 2:
        remedy = "One logit has no spread: use two, or penalise the weights instead (`WeightChangePenalty`)."
        raise ValueError(expected("n_classes", "at least 2", n_classes, remedy))
    factor = math.sqrt(n_classes / (n_classes - 1)) / n_classes
    if source == target:
        return float(gamma)
    return gamma * factor if source == "code" else gamma / factor


def standard_deviation_penalty(
    logits: Tensor, gamma: float = 1.0, *, form: PenaltyForm = "paper", class_dim: int = 1, eps: float = _EPSILON
) -> Tensor:
    r"""The penalty :math:`\gamma \sqrt{\frac{1}{C} \sum_i (z_i - \bar z)^2}`, the mean over all samples.

    Add it to the loss yourself where the callback `StandardDeviationPenalty` cannot (manual optimization). It keeps
    logits from growing without end, so that later steps of a training stay small; what it does to a model's accuracy
    and to its unlearning is a matter of measuring. The value does not change where a constant is added to all logits of
    a sample, so log-probabilities give the penalty of their logits.

    Args:
        logits: (N, C) or (N, C, ...), floating point; half precision is computed in float32.
        gamma: Weight of the penalty.
        form: Unit of `gamma`: `"paper"`, or `"code"` for that of the authors' code (see `convert_gamma`).
        class_dim: Which dimension of the logits is C.
        eps: Added to the variance under the root, whose gradient would be 0/0 for equal logits (a head that is
            initialised with zeros).

    Returns:
        A scalar of the logits' precision, at least float32; differentiable, twice where it is needed.

    Raises:
        ValueError: the logits have another shape or dtype, or an argument is out of range.

    Source: Thudi, Deza, Chandrasekaran, Papernot 2022, arXiv 2109.13398.

    >>> standard_deviation_penalty(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), gamma=2.0)
    tensor(1.0000)
    """
    if logits.ndim < 2 or not logits.is_floating_point():
        got = f"{logits.dtype} of shape {tuple(logits.shape)}"
        raise ValueError(expected("logits", "floating-point numbers of shape (N, C, ...)", got))
    if not -logits.ndim <= class_dim < logits.ndim:
        raise ValueError(expected("class_dim", f"a dimension of the logits {tuple(logits.shape)}", class_dim))
    check_positive("eps", eps)
    weight = convert_gamma(gamma, logits.shape[class_dim], source=form, target="paper")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return weight * (wide.var(dim=class_dim, correction=0) + eps).sqrt().mean()
