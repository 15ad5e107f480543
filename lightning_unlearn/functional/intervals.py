"""How sure a number is that several seeds gave: an interval for a mean, and one for a difference of paired runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import t as student_t
from torch import Tensor

from lightning_unlearn.utilities.checks import check_positive_int, expected

__all__ = ["ConfidenceInterval", "paired_bootstrap", "student_interval"]


@dataclass(frozen=True, slots=True)
class ConfidenceInterval:
    """A mean and where it may lie.

    Attributes:
        mean: Of the values.
        low: Lower end.
        high: Upper end.
        confidence: Share of such intervals that hold the true mean, in (0, 1).

    >>> print(ConfidenceInterval(0.5, 0.4, 0.6, 0.95))
    0.5 (95% interval 0.4 to 0.6)
    """

    mean: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ({100 * self.confidence:.4g}% interval {self.low:.4g} to {self.high:.4g})"


def _checked(name: str, values: Tensor, confidence: float) -> Tensor:
    if values.ndim != 1 or values.numel() < 2 or not values.isfinite().all():
        got = tuple(values.shape) if values.ndim != 1 else values.tolist()
        raise ValueError(expected(name, "a vector of at least two finite values", got, "Run more seeds."))
    if not 0 < confidence < 1:
        raise ValueError(expected("confidence", "a share in (0, 1)", confidence))
    return values.detach().cpu().double()


def student_interval(values: Tensor, *, confidence: float = 0.95) -> ConfidenceInterval:
    """Student's interval for the mean of independent runs.

    Exact where runs are normally distributed, and wide, as it should be, for few: for two runs it is 12.7 times their
    standard error.

    Args:
        values: One number a run, (runs,).
        confidence: In (0, 1).

    Raises:
        ValueError: fewer than two values, one that is not finite, or a confidence out of range.

    >>> print(student_interval(torch.tensor([0.80, 0.82, 0.84])))
    0.82 (95% interval 0.7703 to 0.8697)
    """
    values = _checked("values", values, confidence)
    n = values.numel()
    mean = float(values.mean())
    half = float(student_t.ppf(0.5 + confidence / 2, n - 1)) * float(values.std()) / math.sqrt(n)
    return ConfidenceInterval(mean, mean - half, mean + half, confidence)


def paired_bootstrap(
    first: Tensor, second: Tensor, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> ConfidenceInterval:
    """Percentile bootstrap interval for the mean of `first - second` over runs that belong together (Efron 1979).

    Pairs, such as two methods from the same original model, are drawn together: what both share cancels. With few
    runs it is too narrow; prefer `student_interval(first - second)` below about twenty.

    Args:
        first: One number a run, (runs,).
        second: Of the same runs in the same order, (runs,).
        confidence: In (0, 1).
        resamples: How many.
        seed: Of the resampling; the global random state is neither used nor changed.

    Raises:
        ValueError: as for :func:`student_interval`, or the vectors differ in length.

    >>> base = torch.linspace(0, 1, 30)
    >>> print(paired_bootstrap(base + 0.25, base))
    0.25 (95% interval 0.25 to 0.25)
    """
    check_positive_int("resamples", resamples)
    first, second = _checked("first", first, confidence), _checked("second", second, confidence)
    if first.shape != second.shape:
        raise ValueError(expected("second", f"{first.numel()} values, as `first` has", second.numel()))
    differences = first - second
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(differences), (resamples, len(differences)), generator=generator)
    means = differences[drawn].mean(dim=1)
    ends = torch.tensor([0.5 - confidence / 2, 0.5 + confidence / 2], dtype=torch.float64)
    low, high = means.quantile(ends).tolist()
    return ConfidenceInterval(float(differences.mean()), low, high, confidence)
