"""U-LiRA: can an attacker who trains such models himself tell, for one sample, unlearned models from retrained ones?"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.functional.margins import MARGIN_LIMIT, checked_groups
from lightning_unlearn.utilities.checks import check_positive, check_positive_int, expected

__all__ = ["likelihood_ratios", "u_lira", "u_lira_accuracy"]


def _log_likelihood(observed: Tensor, group: Tensor, variance_floor: float) -> Tensor:
    """Of a Gaussian fitted to the group of every sample, without the constant that cancels."""
    variance = group.var(dim=0, correction=0).clamp_min(variance_floor)
    return -0.5 * (variance.log() + (observed - group.mean(dim=0)) ** 2 / variance)


def likelihood_ratios(
    observed: Tensor,
    unlearned: Tensor,
    retrained: Tensor,
    *,
    variance_floor: float = 1e-6,
    clip: float = MARGIN_LIMIT,
) -> Tensor:
    r"""Score of every observed model and sample: log N(t; unlearned) - log N(t; retrained), in nats.

    Args:
        observed: Margins of the models under attack, (attacked, samples); none of them may be in the two groups.
        unlearned: Margins under models that were trained with the sample and then unlearned it, (models, samples).
        retrained: Margins under models that never saw it, (models, samples).
        variance_floor: Smallest variance of a fit. One is needed where all models of a group agree; the value is ours.
        clip: Margins are clipped to [-clip, clip].

    Returns:
        float64 of shape (attacked, samples); positive says "was trained on it, and unlearned it".

    Raises:
        ValueError: shapes do not fit, a group has fewer than two models, a margin is NaN, or an option is not positive.

    >>> unlearned, retrained = torch.tensor([[1.0], [3.0]]), torch.tensor([[-1.0], [1.0]])
    >>> likelihood_ratios(torch.tensor([[2.0], [1.0]]), unlearned, retrained).flatten().tolist()
    [2.0, 0.0]
    """
    check_positive("variance_floor", variance_floor)
    unlearned, retrained = checked_groups(unlearned, retrained, clip=clip, fewest=2)
    if observed.ndim != 2 or observed.shape[1] != unlearned.shape[1] or observed.isnan().any():
        rule = f"of shape (attacked, {unlearned.shape[1]}), without NaN"
        raise ValueError(expected("observed", rule, tuple(observed.shape), "Use one order of samples for all models."))
    observed = observed.to(unlearned.device).double().clamp(-clip, clip)
    return _log_likelihood(observed, unlearned, variance_floor) - _log_likelihood(observed, retrained, variance_floor)


def u_lira(
    unlearned: Tensor,
    retrained: Tensor,
    *,
    folds: int = 5,
    variance_floor: float = 1e-6,
    clip: float = MARGIN_LIMIT,
) -> tuple[Tensor, Tensor]:
    """Attack every model with Gaussians fitted to models of the other folds: its likelihood ratio for every sample.

    Model i is in fold i modulo `folds`, in both groups, so that those attacked are in neither fit. Leaving out one
    model alone would not do: its own group's fit, and only that, would miss it, and groups of one distribution would
    be told apart less often than by chance.

    In a column, row i is the i-th model *for that sample*: where every model unlearned another forget set, the columns
    may come from different models, as long as they are equally many.

    Guarantee: heuristic; a stronger attack may find more. Source: Hayes et al. 2024 (arXiv 2403.01218). What their
    text leaves open is ours: the folds, the floor, and the fit by maximum likelihood.

    Args:
        unlearned: Margins under models that were trained with the sample and then unlearned it, (models, samples).
        retrained: Margins under models that never saw it, (models, samples).
        folds: In how many parts the models are attacked; a fit has at least two models of each group.
        variance_floor: See :func:`likelihood_ratios`.
        clip: Margins are clipped to [-clip, clip].

    Returns:
        Scores of the unlearned and of the retrained models, float64 in the shapes of the arguments. Positive says
        "unlearned". Their AUROC is `membership_auroc(-unlearned.flatten(), -retrained.flatten())`.

    Raises:
        ValueError: as :func:`likelihood_ratios`, or too few models for so many folds.

    >>> generator = torch.Generator().manual_seed(0)
    >>> kept, clean = torch.randn(40, 50, generator=generator) + 4, torch.randn(40, 50, generator=generator)
    >>> round(float(u_lira_accuracy(*u_lira(kept, clean)).mean()), 2)
    0.98
    >>> round(float(u_lira_accuracy(*u_lira(kept - 4, clean)).mean()), 2)
    0.5
    """
    if check_positive_int("folds", folds) < 2:
        raise ValueError(expected("folds", "at least 2", folds))
    # Of three models in two folds, one fold leaves a single model to fit to.
    fewest = max(folds, 3 if folds > 2 else 4)
    unlearned, retrained = checked_groups(unlearned, retrained, clip=clip, fewest=fewest)
    scores = tuple(torch.empty_like(group) for group in (unlearned, retrained))
    for fold in range(folds):
        attacked = [torch.arange(len(group), device=group.device) % folds == fold for group in (unlearned, retrained)]
        fits = unlearned[~attacked[0]], retrained[~attacked[1]]
        for score, group, mask in zip(scores, (unlearned, retrained), attacked, strict=True):
            score[mask] = likelihood_ratios(group[mask], *fits, variance_floor=variance_floor, clip=clip)
    return scores[0], scores[1]


def u_lira_accuracy(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """Balanced accuracy of "unlearned if the score is positive" for every sample; a score of 0 counts half.

    0.5 is what groups of one distribution have in expectation, however few models there are; the mean over samples is
    the attack's accuracy. Samples share their models, so its error is that of few models, not of many samples.

    Args:
        unlearned: Scores of :func:`u_lira`, (models, samples).
        retrained: Likewise.

    Returns:
        float64 of shape (samples,), in [0, 1].

    >>> u_lira_accuracy(torch.tensor([[1.0], [-2.0]]), torch.tensor([[-1.0], [-3.0]])).tolist()
    [0.75]
    """
    found = (0.5 * (unlearned.sign().double() + 1)).mean(dim=0)
    accused = (0.5 * (retrained.sign().double() + 1)).mean(dim=0)
    return 0.5 * (found + 1 - accused)
