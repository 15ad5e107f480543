"""Membership inference by the loss: are samples that a model was trained on told from samples it never saw?

Positive class = member, score = minus the loss (Yeom et al. 2018, arXiv 1709.01604). All functions take losses of
members and of held-out non-members and are invariant to any increasing transformation of the loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import check_positive_int, expected

__all__ = [
    "cross_entropy_per_sample",
    "membership_accuracy",
    "membership_auroc",
    "membership_auroc_error",
    "membership_tpr_at_fpr",
    "threshold_attack",
]


def cross_entropy_per_sample(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every sample, in nats and float64.

    In float32 the loss of a confident sample rounds to zero, and ties are what a membership attack cannot afford.

    Args:
        logits: (N, C), any floating dtype; log-probabilities will do.
        targets: (N,), integer class numbers.

    Returns:
        float64 of shape (N,).

    Raises:
        ValueError: the shapes are not (N, C) and (N,).

    >>> cross_entropy_per_sample(torch.zeros(1, 2), torch.tensor([1]))
    tensor([0.6931], dtype=torch.float64)
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            expected("logits and targets", "of shapes (N, C) and (N,)", (tuple(logits.shape), tuple(targets.shape)))
        )
    return -logits.double().log_softmax(dim=-1).gather(1, targets.long().unsqueeze(1)).squeeze(1)


def _checked(losses: Tensor, name: str) -> Tensor:
    if losses.ndim != 1 or losses.numel() == 0:
        raise ValueError(
            expected(name, "a vector of at least one loss", tuple(losses.shape), "Members and held-out samples needed.")
        )
    if losses.isnan().any():
        raise ValueError(expected(name, "losses without NaN", f"{int(losses.isnan().sum())} NaN"))
    return losses.double()


def _pair(member_losses: Tensor, nonmember_losses: Tensor) -> tuple[Tensor, Tensor]:
    members = _checked(member_losses, "member_losses")
    return members, _checked(nonmember_losses, "nonmember_losses").to(members.device)


def membership_auroc(member_losses: Tensor, nonmember_losses: Tensor) -> Tensor:
    """Area under the ROC curve of the loss-threshold attack.

    The probability that a member's loss is below a non-member's, ties counted half (Mann-Whitney U). 0.5 means that
    members and non-members cannot be told apart; below 0.5 the members fit worse than unseen samples do, as
    mislabelled samples do for a model that never saw them. The right value is the retrained model's.

    Args:
        member_losses: (N,) losses of samples the original model was trained on.
        nonmember_losses: (M,) losses of held-out samples. Retain samples are members: never pass them here.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        ValueError: a vector is empty, is not a vector, or holds NaN.

    >>> membership_auroc(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.2, 1.0]))
    tensor(0.7500, dtype=torch.float64)
    """
    members, nonmembers = _pair(member_losses, nonmember_losses)
    ordered = nonmembers.sort().values
    not_above = torch.searchsorted(ordered, members, right=True)
    below = torch.searchsorted(ordered, members, right=False)
    above = ordered.numel() - not_above
    wins = above.double() + 0.5 * (not_above - below).double()
    return wins.mean() / ordered.numel()


def membership_auroc_error(auroc: float, n_members: int, n_nonmembers: int) -> float:
    """Standard error of the area under the ROC curve (Hanley and McNeil 1982, Radiology 143:29-36).

    Args:
        auroc: The measured area.
        n_members: Number of members.
        n_nonmembers: Number of non-members.

    Returns:
        The standard error; heuristic, since the formula takes the losses of both groups to be exponentially
        distributed. Non-members, with the larger losses, are what the authors call abnormal.

    >>> round(membership_auroc_error(0.5, 20, 360), 2)
    0.07
    """
    check_positive_int("n_members", n_members)
    check_positive_int("n_nonmembers", n_nonmembers)
    two_nonmembers = auroc / (2 - auroc)
    two_members = 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc)
    variance += (n_members - 1) * (two_members - auroc**2) + (n_nonmembers - 1) * (two_nonmembers - auroc**2)
    return math.sqrt(max(variance, 0.0) / (n_members * n_nonmembers))


def _rates(members: Tensor, nonmembers: Tensor) -> tuple[Tensor, Tensor]:
    """True and false positive rates of "member if loss <= t" for every t at which one changes, and for none."""
    thresholds = torch.unique(torch.cat([members, nonmembers]))
    rates = [
        torch.searchsorted(losses.sort().values, thresholds, right=True).double() / losses.numel()
        for losses in (members, nonmembers)
    ]
    start = torch.zeros(1, dtype=torch.float64, device=members.device)
    return torch.cat([start, rates[0]]), torch.cat([start, rates[1]])


def membership_tpr_at_fpr(member_losses: Tensor, nonmember_losses: Tensor, fpr: float) -> Tensor:
    """Largest share of members found while at most a share `fpr` of non-members is accused.

    The figure to look at where a few exposed samples matter more than the average (Carlini et al. 2022, arXiv
    2112.03570). With fewer than `1 / fpr` non-members this is the rate at zero false alarms: a lower bound.

    Args:
        member_losses: (N,) losses of members.
        nonmember_losses: (M,) losses of held-out samples.
        fpr: Allowed false positive rate in [0, 1], such as 0.01.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        ValueError: `fpr` is outside [0, 1], or a vector is empty or holds NaN.

    >>> membership_tpr_at_fpr(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.5, 1.0]), 0.01)
    tensor(0.6667, dtype=torch.float64)
    """
    if not 0 <= fpr <= 1:
        raise ValueError(expected("fpr", "a rate in [0, 1]", fpr))
    found, accused = _rates(*_pair(member_losses, nonmember_losses))
    return found[accused <= fpr].max()


def membership_accuracy(member_losses: Tensor, nonmember_losses: Tensor) -> Tensor:
    """Balanced accuracy of the best single threshold, chosen on these very losses.

    Balanced, so that it does not depend on how many non-members were drawn: 0.5 is chance, and it equals half of one
    plus the attacker's advantage of Yeom et al. Choosing the threshold on the same samples flatters the attacker:
    with 20 members chance reaches about 0.6.

    Args:
        member_losses: (N,) losses of members.
        nonmember_losses: (M,) losses of held-out samples.

    Returns:
        A float64 scalar in [0.5, 1].

    Raises:
        ValueError: a vector is empty or holds NaN.

    >>> membership_accuracy(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.5, 1.0]))
    tensor(0.8333, dtype=torch.float64)
    """
    found, accused = _rates(*_pair(member_losses, nonmember_losses))
    return (found - accused).max() / 2 + 0.5


def threshold_attack(member_losses: Tensor, nonmember_losses: Tensor) -> dict[str, Tensor]:
    """Everything that is reported of a threshold attack.

    Args:
        member_losses: (N,) losses of members, or another score that is smaller for what looks more like a member.
        nonmember_losses: (M,) of held-out samples. Retain samples are members: never pass them here.

    Returns:
        float64 scalars: `membership_auroc` with its standard error `membership_auroc_error`, the shares of members
        found at 1 % and at 0.1 % false alarms (`membership_tpr_at_1e-2_fpr`, `membership_tpr_at_1e-3_fpr`), and the
        balanced accuracy of the best threshold, `membership_accuracy`.

    Raises:
        ValueError: a vector is empty, is not a vector, or holds NaN.

    >>> threshold_attack(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.2, 1.0]))["membership_auroc"]
    tensor(0.7500, dtype=torch.float64)
    """
    auroc = membership_auroc(member_losses, nonmember_losses)
    error = membership_auroc_error(float(auroc), member_losses.numel(), nonmember_losses.numel())
    return {
        "membership_auroc": auroc,
        "membership_auroc_error": torch.tensor(error, dtype=torch.float64, device=auroc.device),
        "membership_tpr_at_1e-2_fpr": membership_tpr_at_fpr(member_losses, nonmember_losses, 0.01),
        "membership_tpr_at_1e-3_fpr": membership_tpr_at_fpr(member_losses, nonmember_losses, 0.001),
        "membership_accuracy": membership_accuracy(member_losses, nonmember_losses),
    }
