"""Privacy risk score: how probable it is, sample by sample, that a model was trained on it.

A shadow model, trained as the target model was but on other data, shows which values a score takes on members and on
non-members. The posterior read off its histograms is applied to the target model (Song and Mittal 2021, "Systematic
evaluation of privacy risks of machine learning models", arXiv 2003.10595). Training the shadow model is the caller's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_unlearn.utilities.checks import check_positive, check_positive_int, expected, shorten

__all__ = ["modified_entropy", "privacy_risk_score"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _log_odds(logits: Tensor) -> Tensor:
    """log(p_k / (1 - p_k)) for every class, exact to rounding also where p_k is 1 to the last bit."""
    log_p = logits.log_softmax(dim=1)
    # 1 - p cancels only where p is above one half, that is for the largest logit: there it is summed from the others.
    top = logits.argmax(dim=1, keepdim=True)
    others = logits.scatter(1, top, -math.inf).logsumexp(dim=1, keepdim=True)
    log_rest = torch.log1p(-log_p.exp().scatter(1, top, 0.0))
    return (log_p - log_rest).scatter(1, top, logits.gather(1, top) - others)


def modified_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Prediction entropy that knows the true class: 0 for a sure right answer, large for a sure wrong one.

    .. math:: -(1 - p_y) \log p_y - \sum_{k \ne y} p_k \log(1 - p_k)

    In nats, falling in the probability of the true class. It is computed from the log-odds of the logits in float64, so
    that neither a sure nor a wrong answer has to be replaced by a constant: in probabilities, `1 - p` rounds to zero as
    soon as the logits lie 37 apart.

    Args:
        logits: (N, C) with at least two classes, any floating dtype; log-probabilities will do. A class may be
            excluded by minus infinity.
        targets: (N,), integer class numbers in [0, C).

    Returns:
        float64 of shape (N,), at least 0; infinite only where the logits exclude the true class.

    Guarantee:
        Exact, to rounding.

    Source:
        Song and Mittal 2021, arXiv 2003.10595.

    Raises:
        ValueError: shapes, dtypes or class numbers are not as above, or a row of logits holds NaN or plus infinity, or
            no finite number.

    >>> modified_entropy(torch.tensor([[0.0, 0.0], [0.0, 90.0], [90.0, 0.0]]), torch.tensor([1, 1, 1]))
    tensor([6.9315e-01, 1.3428e-78, 1.8000e+02], dtype=torch.float64)
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or logits.shape[1] < 2:
        shapes = (tuple(logits.shape), tuple(targets.shape))
        raise ValueError(expected("logits and targets", "of shapes (N, C) with C of at least 2 and (N,)", shapes))
    if not logits.is_floating_point() or targets.dtype not in _INTEGERS:
        raise ValueError(expected("logits and targets", "floating and integer", (logits.dtype, targets.dtype)))
    outside = (targets < 0) | (targets >= logits.shape[1])
    if outside.any():
        wrong = f"class {shorten(targets[outside].tolist())}"
        raise ValueError(
            expected("targets", f"class numbers below {logits.shape[1]}", wrong, "Drop unlabelled samples.")
        )
    unusable = ~logits.amax(dim=1).isfinite()
    if unusable.any():
        remedy = "A class may be excluded by -inf, but not all of them."
        raise ValueError(expected("logits", "rows with a finite maximum", f"{int(unusable.sum())} other rows", remedy))
    # Signed so that each class has the odds of what is *not* true of it; then both kinds of terms are one expression.
    odds = _log_odds(logits.double())
    truth = targets.long().unsqueeze(1)
    odds = odds.scatter(1, truth, -odds.gather(1, truth))
    return -(odds.sigmoid() * logsigmoid(-odds)).sum(dim=1)


def _checked(name: str, scores: Tensor, labels_name: str, labels: Tensor, log_bins: bool) -> Tensor:
    """The scores in float64, if they can be sorted into bins."""
    if scores.ndim != 1 or scores.numel() == 0:
        raise ValueError(expected(name, "a vector of at least one score", tuple(scores.shape)))
    if labels.shape != scores.shape or labels.dtype not in _INTEGERS:
        got = (tuple(labels.shape), labels.dtype)
        raise ValueError(expected(labels_name, f"an integer vector of {scores.numel()} class numbers", got))
    unusable = int((~scores.isfinite()).sum())
    if unusable:
        raise ValueError(expected(name, "finite", f"{unusable} infinite or NaN", "Such a score belongs to no bin."))
    if log_bins and (scores < 0).any():
        remedy = "Use log_bins=False for scores of either sign."
        raise ValueError(expected(name, "at least 0 with log_bins=True", float(scores.min()), remedy))
    return scores.double()


def _of_classes(classes: Tensor, scores: Tensor, labels_name: str, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Shadow scores of the classes asked for, and the position of each one's class among them."""
    labels = labels.long().to(classes.device)
    missing = classes[~torch.isin(classes, labels)].tolist()
    if missing:
        raise ValueError(
            expected(
                labels_name,
                "labels of every class among `labels`",
                f"none of class {shorten(missing)}",
                "Add shadow samples of these classes, or leave the classes out.",
            )
        )
    kept = torch.isin(labels, classes)
    return scores.to(classes.device)[kept], torch.searchsorted(classes, labels[kept])


def _inner_edges(values: Tensor, places: Tensor, n_classes: int, n_bins: int) -> Tensor:
    """(K, B - 1): what separates the bins of each class, equally wide over the range of its values."""
    low, high = (
        values.new_zeros(n_classes).scatter_reduce(0, places, values, how, include_self=False).unsqueeze(1)
        for how in ("amin", "amax")
    )
    return low + (high - low) * torch.arange(1, n_bins, device=values.device) / n_bins


def _nearest_filled(filled: Tensor) -> Tensor:
    """(K, B): for each bin itself or, where it is empty, the nearest that is not; of two equally near, the left."""
    here = torch.arange(filled.shape[1], device=filled.device)
    rank = 2 * (here - here.unsqueeze(1)).abs() + (here > here.unsqueeze(1))
    return (rank + 2 * len(here) * ~filled.unsqueeze(1)).argmin(dim=2)


def privacy_risk_score(
    scores: Tensor,
    labels: Tensor,
    shadow_member_scores: Tensor,
    shadow_member_labels: Tensor,
    shadow_nonmember_scores: Tensor,
    shadow_nonmember_labels: Tensor,
    *,
    n_bins: int = 5,
    log_bins: bool = True,
    floor: float = 1e-10,
) -> Tensor:
    r"""Posterior probability that each sample was a member, from histograms of a shadow model's scores.

    For each class, :math:`P_{in}[b] / (P_{in}[b] + P_{out}[b])` with b the sample's bin and P the share of the shadow
    model's members, or non-members, of that class in it. Shares and not counts, as in the authors' code: members and
    non-members are equally probable beforehand, in every class, however many of each the shadow sets hold.

    Both histograms of a class have the same bins, over the range of its shadow scores together. A value on an inner
    edge belongs to the bin above it. A sample outside the range gets the end bin, one in a bin without any shadow score
    the nearest bin that has one, of two equally near the lower. These rules are the authors' code's as well. Refused
    here and not there are a class that one shadow set lacks, negative scores on logarithmic bins, which would all be
    raised to the floor, and scores that are not finite.

    0.5 means that the shadow model does not tell members from non-members there. For each class, the mean over the
    shadow members and the mean over the shadow non-members sum to 1, so the mean over samples that a model never saw is
    not 0.5 but *below* it where the shadow sets differ. The right value is the retrained model's.

    With linear bins the score is unchanged by increasing affine maps of all scores, with logarithmic ones by positive
    powers and factors (above the floor); not by every increasing map.

    Args:
        scores: (N,) of the samples in question under the target model, such as those of :func:`modified_entropy` or
            losses; any floating dtype, binned in float64.
        labels: (N,), their integer classes.
        shadow_member_scores: (M,) of samples that the shadow model was trained on, under the shadow model.
        shadow_member_labels: (M,), their classes.
        shadow_nonmember_scores: (L,) of samples that the shadow model never saw, under the shadow model.
        shadow_nonmember_labels: (L,), their classes.
        n_bins: Bins a class. Each needs tens of shadow samples: with one, its score is 0 or 1.
        log_bins: Equal widths on a logarithmic scale, which the authors recommend; scores then have to be at least 0.
        floor: Smaller scores are taken for this with `log_bins`; unused without.

    Returns:
        float64 of shape (N,) in [0, 1], on the device of `scores`.

    Guarantee:
        Heuristic: an estimate under the assumption that the shadow model behaves as the target model does, of this
        one attack. A stronger attack may find more.

    Source:
        Song and Mittal 2021, arXiv 2003.10595; defaults of their code. The code published with "Unrolling SGD" (Thudi
        et al. 2022, arXiv 2109.13398) bins each shadow set over a range of its own, so its scores are others.

    Raises:
        ValueError: shapes or dtypes are not as above, there are no scores, one is NaN or infinite, or negative
            with `log_bins`, or a class among `labels` is missing from a shadow set.

    >>> zeros = torch.zeros(4, dtype=torch.long)
    >>> members, nonmembers = torch.tensor([0.01, 0.01, 0.01, 1.0]), torch.tensor([0.01, 1.0, 1.0, 1.0])
    >>> privacy_risk_score(torch.tensor([0.0, 0.02, 0.5, 7.0]), zeros, members, zeros, nonmembers, zeros)
    tensor([0.7500, 0.7500, 0.2500, 0.2500], dtype=torch.float64)
    """
    check_positive_int("n_bins", n_bins)
    check_positive("floor", floor)
    values = _checked("scores", scores, "labels", labels, log_bins)
    members = _checked(
        "shadow_member_scores", shadow_member_scores, "shadow_member_labels", shadow_member_labels, log_bins
    )
    nonmembers = _checked(
        "shadow_nonmember_scores", shadow_nonmember_scores, "shadow_nonmember_labels", shadow_nonmember_labels, log_bins
    )
    classes, places = torch.unique(labels.long().to(values.device), return_inverse=True)
    groups = [
        (values, places),
        _of_classes(classes, members, "shadow_member_labels", shadow_member_labels),
        _of_classes(classes, nonmembers, "shadow_nonmember_labels", shadow_nonmember_labels),
    ]
    if log_bins:
        groups = [(group.clamp_min(floor).log(), places) for group, places in groups]
    shadow_values, shadow_places = (torch.cat(both) for both in zip(*groups[1:], strict=True))
    edges = _inner_edges(shadow_values, shadow_places, len(classes), n_bins)
    cells = [places * n_bins + (edges[places] <= group.unsqueeze(1)).sum(dim=1) for group, places in groups]
    counts = [torch.bincount(cell, minlength=len(classes) * n_bins).view(-1, n_bins).double() for cell in cells[1:]]
    inside, outside = (count / count.sum(dim=1, keepdim=True) for count in counts)
    posterior = inside / (inside + outside)  # NaN in empty bins, which are never read
    return posterior.gather(1, _nearest_filled(inside + outside > 0)).flatten()[cells[0]]
