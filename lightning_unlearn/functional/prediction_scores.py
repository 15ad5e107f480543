"""What a prediction gives away about its sample: confidence, entropy and modified entropy, and what attacks read off.

Everything is computed from the log-odds of the logits in float64, so that neither a sure nor a wrong answer has to be
replaced by a constant: in probabilities, `1 - p` rounds to zero as soon as the logits lie 37 apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_unlearn.functional.membership import cross_entropy_per_sample
from lightning_unlearn.utilities.checks import check_choice, expected, shorten

__all__ = [
    "ATTACK_FEATURES",
    "INTEGER_DTYPES",
    "MEMBERSHIP_SCORES",
    "AttackFeature",
    "MembershipScore",
    "attack_features",
    "confidence_log_odds",
    "membership_score",
    "modified_entropy",
    "prediction_entropy",
]

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Dtypes that class numbers may have."""

MembershipScore: TypeAlias = Literal["loss", "confidence", "entropy", "modified_entropy"]
AttackFeature: TypeAlias = Literal["correctness", "confidence", "entropy", "modified_entropy", "probabilities"]


def _checked_logits(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(expected("logits", "of shape (N, C) with C of at least 2", tuple(logits.shape)))
    if not logits.is_floating_point():
        raise ValueError(expected("logits", "floating", logits.dtype))
    unusable = ~logits.amax(dim=1).isfinite()
    if unusable.any():
        remedy = "A class may be excluded by -inf, but not all of them."
        raise ValueError(expected("logits", "rows with a finite maximum", f"{int(unusable.sum())} other rows", remedy))
    return logits.double()


def _checked_truth(logits: Tensor, targets: Tensor) -> Tensor:
    """(N, 1): the true class of every row, ready for gathering."""
    if targets.shape != logits.shape[:1] or targets.dtype not in INTEGER_DTYPES:
        got = (tuple(targets.shape), targets.dtype)
        raise ValueError(expected("targets", f"integers of shape {tuple(logits.shape[:1])}", got))
    outside = (targets < 0) | (targets >= logits.shape[1])
    if outside.any():
        wrong = f"class {shorten(targets[outside].tolist())}"
        raise ValueError(
            expected("targets", f"class numbers below {logits.shape[1]}", wrong, "Drop unlabelled samples.")
        )
    return targets.long().unsqueeze(1)


def _log_odds(logits: Tensor) -> Tensor:
    """log(p_k / (1 - p_k)) for every class, exact to rounding also where p_k is 1 to the last bit."""
    log_p = logits.log_softmax(dim=1)
    # 1 - p cancels only where p is above one half, that is for the largest logit: there it is summed from the others.
    top = logits.argmax(dim=1, keepdim=True)
    others = logits.scatter(1, top, -math.inf).logsumexp(dim=1, keepdim=True)
    log_rest = torch.log1p(-log_p.exp().scatter(1, top, 0.0))
    return (log_p - log_rest).scatter(1, top, logits.gather(1, top) - others)


def confidence_log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Confidence in the true class on the scale of log-odds, :math:`\log p_y - \log(1 - p_y)`.

    Orders samples as the probability itself and minus the loss do, and resolves both ends, where a probability rounds
    to 1 and a loss to 0.

    Args:
        logits: (N, C) with at least two classes, any floating dtype; log-probabilities will do. A class may be
            excluded by minus infinity.
        targets: (N,), integer class numbers in [0, C).

    Returns:
        float64 of shape (N,); infinite only where the logits exclude the true class, or all others.

    Guarantee:
        Exact, to rounding.

    Source:
        The "logit scaling" of Carlini et al. 2022, arXiv 2112.03570.

    Raises:
        ValueError: shapes, dtypes or class numbers are not as above, or a row of logits holds NaN or plus infinity, or
            no finite number.

    >>> confidence_log_odds(torch.tensor([[0.0, 0.0], [90.0, 0.0]]), torch.tensor([0, 0]))
    tensor([ 0., 90.], dtype=torch.float64)
    """
    checked = _checked_logits(logits)
    return _log_odds(checked).gather(1, _checked_truth(logits, targets)).squeeze(1)


def prediction_entropy(logits: Tensor) -> Tensor:
    r"""Shannon entropy of the predicted distribution, :math:`-\sum_k p_k \log p_k`, in nats; it ignores the label.

    Args:
        logits: (N, C) as for :func:`confidence_log_odds`.

    Returns:
        float64 of shape (N,), between 0 and ln C.

    Guarantee:
        Exact, to rounding.

    Source:
        As a score of membership: Salem et al. 2019, arXiv 1806.01246.

    Raises:
        ValueError: shape or dtype are not as above, or a row holds NaN or plus infinity, or no finite number.

    >>> prediction_entropy(torch.tensor([[0.0, 0.0], [90.0, 0.0]]))
    tensor([6.9315e-01, 7.4566e-38], dtype=torch.float64)
    """
    odds = _log_odds(_checked_logits(logits))
    terms = odds.sigmoid() * logsigmoid(odds)
    # An excluded class is 0 times minus infinity, and its share of the entropy is 0.
    return -terms.where(odds > -math.inf, 0.0).sum(dim=1)


def modified_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Prediction entropy that knows the true class: 0 for a sure right answer, large for a sure wrong one.

    .. math:: -(1 - p_y) \log p_y - \sum_{k \ne y} p_k \log(1 - p_k)

    In nats, falling in the probability of the true class.

    Args:
        logits: (N, C) as for :func:`confidence_log_odds`.
        targets: (N,), integer class numbers in [0, C).

    Returns:
        float64 of shape (N,), at least 0; infinite only where the logits exclude the true class.

    Guarantee:
        Exact, to rounding.

    Source:
        Song and Mittal 2021, arXiv 2003.10595. The `m_entropy` of the code published with Unlearn-Sparse and SalUn is
        another quantity: it has `log p` where the formula has `log(1 - p)`, and its indexing takes every sample's label
        for a label of all samples of the batch.

    Raises:
        ValueError: as for :func:`confidence_log_odds`.

    >>> modified_entropy(torch.tensor([[0.0, 0.0], [0.0, 90.0], [90.0, 0.0]]), torch.tensor([1, 1, 1]))
    tensor([6.9315e-01, 1.3428e-78, 1.8000e+02], dtype=torch.float64)
    """
    # Signed so that each class has the odds of what is *not* true of it; then both kinds of terms are one expression.
    odds = _log_odds(_checked_logits(logits))
    truth = _checked_truth(logits, targets)
    odds = odds.scatter(1, truth, -odds.gather(1, truth))
    return -(odds.sigmoid() * logsigmoid(-odds)).sum(dim=1)


MEMBERSHIP_SCORES: Mapping[MembershipScore, Callable[[Tensor, Tensor], Tensor]] = {
    "loss": lambda logits, targets: -cross_entropy_per_sample(logits, targets),
    "confidence": confidence_log_odds,
    "entropy": lambda logits, targets: -prediction_entropy(logits),
    "modified_entropy": lambda logits, targets: -modified_entropy(logits, targets),
}
"""Name -> function of logits and targets, larger for samples that look more like members."""


def membership_score(logits: Tensor, targets: Tensor, score: MembershipScore) -> Tensor:
    """Score by which a threshold attack tells members from non-members: the larger, the more like a member.

    `"loss"` is minus the cross-entropy, `"confidence"` the log-odds of the true class, the other two minus an entropy.
    Loss and confidence order samples alike, so their attacks are one and the same until losses round to zero; papers
    report both. Entropy does not know the label: a confident mistake looks like a member.

    Args:
        logits: (N, C) as for :func:`confidence_log_odds`.
        targets: (N,), integer class numbers in [0, C).
        score: Which score.

    Returns:
        float64 of shape (N,).

    Guarantee:
        Exact, to rounding. As an attack heuristic: there are stronger ones.

    Source:
        Yeom et al. 2018, arXiv 1709.01604 (loss); Song and Mittal 2021, arXiv 2003.10595 (the others).

    Raises:
        ValueError: the score is another, or as for :func:`confidence_log_odds`.

    >>> membership_score(torch.tensor([[3.0, 0.0]]), torch.tensor([0]), "confidence")
    tensor([3.], dtype=torch.float64)
    """
    check_choice("score", score, MEMBERSHIP_SCORES)
    return MEMBERSHIP_SCORES[score](logits, targets)


ATTACK_FEATURES: Mapping[AttackFeature, Callable[[Tensor, Tensor], Tensor]] = {
    "correctness": lambda logits, targets: (logits.argmax(dim=1) == targets).double(),
    "confidence": lambda logits, targets: confidence_log_odds(logits, targets).sigmoid(),
    "entropy": lambda logits, targets: prediction_entropy(logits),
    "modified_entropy": modified_entropy,
    "probabilities": lambda logits, targets: _log_odds(logits.double()).sigmoid(),
}
"""Name -> function of logits and targets, on the scale on which papers give it to a classifier."""


def attack_features(logits: Tensor, targets: Tensor, feature: AttackFeature) -> Tensor:
    """Features that a classifier attack is trained on, one row a sample.

    Args:
        logits: (N, C) as for :func:`confidence_log_odds`.
        targets: (N,), integer class numbers in [0, C).
        feature: `"correctness"` (0 or 1), `"confidence"` (probability of the true class), `"entropy"`,
            `"modified_entropy"` (nats) or `"probabilities"` (of all classes).

    Returns:
        float64 of shape (N, 1), or (N, C) for the probabilities.

    Guarantee:
        Exact, to rounding.

    Source:
        The five attacks of Jia et al. 2023, arXiv 2304.04934, and Fan et al. 2024, arXiv 2310.12508 (their code).

    Raises:
        ValueError: the feature is another, or as for :func:`confidence_log_odds`.

    >>> attack_features(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([1, 0]), "confidence")
    tensor([[0.5000],
            [0.1192]], dtype=torch.float64)
    """
    check_choice("feature", feature, ATTACK_FEATURES)
    _checked_truth(_checked_logits(logits), targets)  # of every feature, also of those that need less
    values = ATTACK_FEATURES[feature](logits, targets)
    return values if values.ndim == 2 else values.unsqueeze(1)
