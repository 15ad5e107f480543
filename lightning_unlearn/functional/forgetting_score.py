r"""The score of the NeurIPS 2023 unlearning competition: how large an epsilon the outputs of many models betray.

For one sample, an attacker who calls a model unlearned or retrained by a rule on its margin, with false positive rate
FPR and false negative rate FNR, shows that unlearning is no better than (epsilon, delta)-indistinguishable from
retraining, with epsilon at least ln((1 - delta - FPR) / FNR), and the same with the rates exchanged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_unlearn.functional.margins import MARGIN_LIMIT, checked_groups
from lightning_unlearn.utilities.checks import check_fraction, check_positive, check_positive_int, expected

__all__ = ["bucket_points", "competition_score", "forgetting_epsilons", "forgetting_score"]

_BUFFER = 2.0
"""How far around the peakier group the ends of intervals are tried, in units of the margin."""

_BUCKET = 0.5
"""Width in epsilon over which the points halve."""


def _share_in(group: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Share of a sorted group in [low, high]."""
    inside = torch.searchsorted(group, high, right=True) - torch.searchsorted(group, low, right=False)
    return inside.clamp_min(0).double() / group.numel()


def _single_rates(positive: Tensor, negative: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """False positive and negative rates of "positive if the margin is at least t", for t over the joint range."""
    low, high = torch.minimum(positive[0], negative[0]), torch.maximum(positive[-1], negative[-1])
    steps = math.ceil(float(high - low) * resolution)
    thresholds = torch.linspace(float(low), float(high), steps, dtype=torch.float64, device=positive.device)
    return _share_in(negative, thresholds, high), 1 - _share_in(positive, thresholds, high)


def _double_rates(first: Tensor, second: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """The same of "the peakier group if the margin is in [l, r]", for ends near those of the peakier group."""
    widths = first[-1] - first[0], second[-1] - second[0]
    peaky, broad = (first, second) if widths[0] < widths[1] else (second, first)
    width = torch.minimum(*widths)
    steps = math.ceil(2 * _BUFFER * resolution)
    offsets = torch.linspace(-_BUFFER, _BUFFER, steps, dtype=torch.float64, device=first.device)
    right = (peaky[-1] + offsets).unsqueeze(1).expand(-1, steps).contiguous()
    left = right - width + offsets
    return _share_in(broad, left, right), 1 - _share_in(peaky, left, right)


def _largest_epsilon(false_positive: Tensor, false_negative: Tensor, delta: float) -> float:
    """Over rules of which both rates are above 0; infinite if both are 0 for some rule, NaN where no rule is left."""
    if ((false_positive == 0) & (false_negative == 0)).any():
        return math.inf
    # One rate of 0 more likely means too few models than an infinite epsilon: the competition drops such rules.
    kept = (false_positive > 0) & (false_negative > 0)
    if not kept.any():
        return math.nan
    fpr, fnr = false_positive[kept], false_negative[kept]
    epsilons = torch.maximum(
        (1 - delta - fpr).clamp_min(0).log() - fnr.log(), (1 - delta - fnr).clamp_min(0).log() - fpr.log()
    )
    return max(float(epsilons.max()), 0.0)


def _epsilon(unlearned: Tensor, retrained: Tensor, delta: float, resolution: int, cap: float, ratio: float) -> float:
    """Of one sample; both groups sorted."""
    widths = sorted(float(group[-1] - group[0]) for group in (unlearned, retrained))
    if widths[1] == 0:
        return 0.0 if unlearned[0] == retrained[0] else cap
    if widths[0] / widths[1] < ratio:
        return cap
    # The median of NumPy, which the code uses: the mean of the middle two.
    above = retrained.quantile(0.5) > unlearned.quantile(0.5)
    positive, negative = (retrained, unlearned) if above else (unlearned, retrained)
    rates = _double_rates(positive, negative, resolution), _single_rates(positive, negative, resolution)
    false_positive, false_negative = (
        torch.cat([double.flatten(), single]) for double, single in zip(*rates, strict=True)
    )
    return min(_largest_epsilon(false_positive, false_negative, delta), cap)


def forgetting_epsilons(
    unlearned: Tensor,
    retrained: Tensor,
    *,
    delta: float = 1e-5,
    resolution: int = 100,
    cap: float = 50.0,
    ratio: float = 0.01,
    clip: float = MARGIN_LIMIT,
) -> Tensor:
    """Largest epsilon that a threshold or an interval of the margin betrays, for every sample.

    Two families of rules are tried, as in the code of the competition: one threshold over the joint range (the group
    with the larger median is positive), and intervals whose ends lie within 2 of those of the peakier group. Rules of
    which exactly one rate is 0 are dropped; if both are 0, or if one group's range is below `ratio` of the other's,
    epsilon is `cap`.

    Guarantee: heuristic, a lower bound on epsilon from finitely many models. Source: the evaluation code of the NeurIPS
    2023 machine unlearning challenge (Triantafillou et al. 2024, arXiv 2406.09073). The code checks by `assert` on an
    array that a rule is left, which fails whenever several are; here a sample without any is NaN. Margins that all
    are one number, which the code divides 0 by 0 for, have epsilon 0 or `cap`. It bounds confidences by adding 1e-45 to
    probabilities, which is about 103; here `clip` does.

    Args:
        unlearned: Margins, (models, samples).
        retrained: Margins, (models, samples).
        delta: Of (epsilon, delta)-indistinguishability.
        resolution: Thresholds in a unit of the margin.
        cap: Largest epsilon.
        ratio: See above.
        clip: Margins are clipped to [-clip, clip].

    Returns:
        float64 of shape (samples,) in [0, cap]; NaN where no rule is left.

    Raises:
        ValueError: shapes do not fit, a group has fewer than three models, a margin is NaN, or an option is out of
            range.

    >>> models = torch.arange(4.0).unsqueeze(1)
    >>> forgetting_epsilons(models, models), forgetting_epsilons(models, models + 9)
    (tensor([0.], dtype=torch.float64), tensor([50.], dtype=torch.float64))
    """
    check_fraction("delta", delta, zero=True)
    check_fraction("ratio", ratio, zero=True)
    check_positive("cap", cap)
    check_positive_int("resolution", resolution)
    unlearned, retrained = checked_groups(unlearned, retrained, clip=clip, fewest=3)
    first, second = (group.sort(dim=0).values.T.contiguous() for group in (unlearned, retrained))
    epsilons = [_epsilon(a, b, delta, resolution, cap, ratio) for a, b in zip(first, second, strict=True)]
    return torch.tensor(epsilons, dtype=torch.float64, device=unlearned.device)


def bucket_points(epsilons: Tensor, models: int) -> Tensor:
    """Points of every sample: 1 for an epsilon below 0.5, and half as many for every further 0.5.

    No points beyond ceil(ln(models - 1)), the largest epsilon that so many models can show.

    Args:
        epsilons: (samples,).
        models: In the smaller group, at least three.

    Returns:
        float64 of shape (samples,); 0 for NaN.

    Raises:
        ValueError: fewer than three models.

    >>> bucket_points(torch.tensor([0.2, 0.5, 1.7, 50.0]), models=512).tolist()
    [1.0, 0.5, 0.125, 0.0]
    """
    if models < 3:
        raise ValueError(expected("models", "at least 3 in each group", models))
    buckets = math.ceil(math.log(models - 1)) / _BUCKET
    bucket = (epsilons.double() / _BUCKET).floor()
    return torch.where(bucket < buckets, 0.5**bucket, 0.0)


def forgetting_score(
    unlearned: Tensor,
    retrained: Tensor,
    *,
    delta: float = 1e-5,
    resolution: int = 100,
    clip: float = MARGIN_LIMIT,
) -> Tensor:
    """Mean points over the samples: 1 where no rule tells unlearned from retrained models, 0 where every sample does.

    Not a number to compare over different numbers of models: with few, even one distribution loses points to chance
    (give halves of the retrained models to see how many), and little that is wrong can be shown. The competition used
    512 and 512.

    Args:
        unlearned: Margins, (models, samples).
        retrained: Margins, (models, samples).
        delta: See :func:`forgetting_epsilons`, which has the source.
        resolution: Likewise.
        clip: Likewise.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        ValueError: as :func:`forgetting_epsilons`.

    >>> models = torch.linspace(-3, 3, 40).unsqueeze(1)
    >>> forgetting_score(models, models), forgetting_score(models, models + 9)
    (tensor(1., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    epsilons = forgetting_epsilons(unlearned, retrained, delta=delta, resolution=resolution, clip=clip)
    return bucket_points(epsilons, min(len(unlearned), len(retrained))).mean()


def competition_score(
    forgetting: Tensor | float,
    *,
    retain_accuracies: tuple[Tensor, Tensor],
    test_accuracies: tuple[Tensor, Tensor],
) -> Tensor:
    """The final score: forgetting times what is left of the accuracy on retain and on test data.

    Args:
        forgetting: What :func:`forgetting_score` gives.
        retain_accuracies: Of every unlearned and of every retrained model, fractions, (models,) each.
        test_accuracies: Likewise on test data.

    Returns:
        A float64 scalar: forgetting x RA_unlearned / RA_retrained x TA_unlearned / TA_retrained, of mean accuracies.
        Above `forgetting` where unlearned models are the more accurate ones.

    Raises:
        ValueError: a group has no accuracy, or the retrained models' is 0.

    >>> half, full = torch.tensor([0.4, 0.6]), torch.tensor([1.0])
    >>> competition_score(0.8, retain_accuracies=(half, full), test_accuracies=(full, full))
    tensor(0.4000, dtype=torch.float64)
    """
    score = torch.as_tensor(forgetting, dtype=torch.float64)
    for name, (unlearned, retrained) in (
        ("retain_accuracies", retain_accuracies),
        ("test_accuracies", test_accuracies),
    ):
        if not unlearned.numel() or not retrained.numel() or not retrained.any():
            got = (unlearned.tolist(), retrained.tolist())
            raise ValueError(expected(name, "accuracies of both groups, above 0 for retrained models", got))
        score = score * (unlearned.double().mean() / retrained.double().mean())
    return score
