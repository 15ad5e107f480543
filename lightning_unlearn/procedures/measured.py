"""A number with how sure it is over the samples: means, shares, and areas under ROC curves."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import norm
from torch import Tensor

from lightning_unlearn.functional.intervals import student_interval
from lightning_unlearn.functional.membership import membership_auroc, membership_auroc_error
from lightning_unlearn.procedures.evidence import mean_estimate, share_estimate

__all__ = ["Measured", "measured_auroc", "measured_mean", "measured_share"]

_TWO_SIDED = float(norm.ppf(0.975))


@dataclass(frozen=True, slots=True)
class Measured:
    """A value, and how sure it is.

    Attributes:
        value: What was measured.
        spread: Its standard error over samples, `None` where it has none.
        interval: Ends of a 95 % interval over samples, `None` where none can be given.
    """

    value: float
    spread: float | None = None
    interval: tuple[float, float] | None = None


def measured_mean(values: Tensor) -> Measured:
    """Mean of a number a sample, with Student's interval; without one for a single sample, or where one is not finite.

    >>> import torch
    >>> [round(end, 4) for end in measured_mean(torch.tensor([0.80, 0.82, 0.84])).interval]
    [0.7703, 0.8697]
    """
    estimate = mean_estimate(values)
    if values.numel() < 2 or not bool(values.isfinite().all()):
        return Measured(estimate.value, estimate.error)
    interval = student_interval(values)
    return Measured(estimate.value, estimate.error, (interval.low, interval.high))


def measured_share(hits: Tensor) -> Measured:
    """Share of true entries, with the interval of Agresti and Coull 1998 (two added to both sides), cut to [0, 1].

    >>> import torch
    >>> [round(end, 4) for end in measured_share(torch.ones(20, dtype=torch.bool)).interval]
    [0.8061, 1.0]
    """
    estimate = share_estimate(hits)
    # The interval lies around the smoothed share: around the share itself, it would not be one at 0 and 1.
    center = (int(hits.sum()) + 2) / (hits.numel() + 4)
    return Measured(estimate.value, estimate.error, _normal(center, estimate.error))


def measured_auroc(members: Tensor, nonmembers: Tensor) -> Measured:
    """Area under the ROC curve of a threshold on losses, or other numbers that are small for members.

    With a normal interval from the standard error of Hanley and McNeil 1982, cut to [0, 1]. That error is 0 where the
    groups are separated, however few samples say so: there is no interval there.

    Args:
        members: (N,), without NaN.
        nonmembers: (M,), the same.

    >>> import torch
    >>> measured_auroc(torch.zeros(5), torch.ones(5))
    Measured(value=1.0, spread=0.0, interval=None)
    """
    value = float(membership_auroc(members, nonmembers))
    error = membership_auroc_error(value, members.numel(), nonmembers.numel())
    return Measured(value, error, _normal(value, error) if 0 < value < 1 else None)


def _normal(center: float, error: float) -> tuple[float, float]:
    low, high = center - _TWO_SIDED * error, center + _TWO_SIDED * error
    return max(low, 0.0), min(high, 1.0)
