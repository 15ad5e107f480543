"""When is a metric sane? The rule of `metric_sanity.py`, as a pure function of deviations, and its thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["CAP", "CLOSE", "EXPECTED", "FAR", "Finding", "Judgement", "distance", "judge", "spread_of"]

FAR = 3.0
"""An original at least so many spreads from the reference is told apart."""

CLOSE = 2.0
"""What is at most so many spreads from the reference is not."""

CAP = 1000.0
"""Largest distance that is written down; where retrained models agree to the last digit there would be no bound."""

Finding: TypeAlias = Literal["separable", "not separable", "unclear", "unstable"]

EXPECTED: dict[str, Finding] = {
    "mislabelled": "separable",
    "class": "separable",
    "random": "not separable",
}
"""What a sane metric says, by scenario."""


def spread_of(deviations: Sequence[float]) -> float:
    """Root mean square of the deviations between independently retrained models.

    >>> spread_of([3.0, -4.0])
    3.5355339059327378
    """
    return math.sqrt(math.fsum(value * value for value in deviations) / len(deviations))


def distance(deviations: Sequence[float], spread: float) -> float:
    """Mean magnitude of deviations in units of the spread, at most `CAP`.

    >>> distance([1.0, -3.0], 0.5), distance([0.0], 0.0), distance([0.1], 0.0)
    (4.0, 0.0, 1000.0)
    """
    mean = math.fsum(abs(value) for value in deviations) / len(deviations)
    if mean == 0:
        return 0.0
    return CAP if mean >= CAP * spread else mean / spread


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a metric says in one scenario.

    Attributes:
        spread: Root mean square deviation between retrained models, in the metric's unit.
        separation: Distance of the untouched original from the reference, in spreads.
        closeness: Distance of the second retrained model, in spreads; about 0.8 for normal deviations.
        finding: `"unstable"` where the second retrained model is not close, else what the separation says.
    """

    spread: float
    separation: float
    closeness: float
    finding: Finding


def judge(original: Sequence[float], second: Sequence[float], third: Sequence[float]) -> Judgement:
    """Judge deviations m(model) - m(reference), one a seed: of originals, and of two disjoint sets of retrainings.

    The third set gives the spread, so that the second, which is held against it, has no part in its own unit.

    >>> judge([9.0, 11.0], [1.0, -0.5], [1.0, -1.0]).finding
    'separable'
    >>> judge([1.0, -1.0], [1.0, -0.5], [1.0, -1.0]).finding
    'not separable'
    """
    if not (original and second and third):
        raise ValueError("Expected at least one deviation of every kind.")
    spread = spread_of(third)
    separation, closeness = distance(original, spread), distance(second, spread)
    finding: Finding
    if closeness > CLOSE:
        finding = "unstable"
    elif separation >= FAR:
        finding = "separable"
    else:
        finding = "not separable" if separation <= CLOSE else "unclear"
    return Judgement(spread, separation, closeness, finding)
