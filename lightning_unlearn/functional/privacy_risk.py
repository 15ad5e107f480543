"""Privacy risk score: how probable it is, sample by sample, that a model was trained on it.

A shadow model, trained as the target model was but on other data, shows which values a score takes on members and on
non-members. The posterior read off its histograms is applied to the target model (Song and Mittal 2021, "Systematic
evaluation of privacy risks of machine learning models", arXiv 2003.10595). Training the shadow model is the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.functional.prediction_scores import INTEGER_DTYPES
from lightning_unlearn.utilities.checks import check_positive, check_positive_int, expected, shorten

__all__ = ["privacy_risk_score"]


def _checked(name: str, scores: Tensor, labels_name: str, labels: Tensor, log_bins: bool) -> Tensor:
    """The scores in float64, if they can be sorted into bins."""
    if scores.ndim != 1 or scores.numel() == 0:
        raise ValueError(expected(name, "a vector of at least one score", tuple(scores.shape)))
    if labels.shape != scores.shape or labels.dtype not in INTEGER_DTYPES:
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
        scores: (N,) of the samples in question under the target model, such as those of
            :func:`lightning_unlearn.functional.prediction_scores.modified_entropy`, or losses; any floating dtype,
            binned in float64.
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
