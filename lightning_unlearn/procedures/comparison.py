"""One metric of several models next to the value it should have: rows of an evaluation, and what they mean in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning import LightningModule

from lightning_unlearn.procedures.measured import Measured
from lightning_unlearn.procedures.outputs import ModelOutputs
from lightning_unlearn.results import MetricValue, ModelRole, NoiseFloor, Target
from lightning_unlearn.types import Split

__all__ = ["Comparison", "Metric", "noise_floor", "rows_of"]

_ROLES: tuple[ModelRole, ...] = ("original", "unlearned", "retrained", "placebo")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the rows are computed from.

    Attributes:
        models: Role -> module.
        outputs: Role -> split -> outputs.
        references: Further retrained models: a module and its outputs by split, for each.
        true_outputs: Role -> outputs on the forget set scored against the true labels, empty if they are not known.
        altered: Whether any label of the forget set is known to be wrong.
        paired: Whether the retrained model shares initial weights and order of data with the original.
        min_members: Fewest members and non-members that a membership attack is run with.
    """

    models: Mapping[ModelRole, LightningModule]
    outputs: Mapping[ModelRole, Mapping[Split, ModelOutputs]]
    references: Sequence[tuple[LightningModule, Mapping[Split, ModelOutputs]]]
    true_outputs: Mapping[ModelRole, ModelOutputs]
    altered: bool
    paired: bool
    min_members: int = 10

    @property
    def has_retrained(self) -> bool:
        """Whether there is a retrained model."""
        return "retrained" in self.models


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of every model.

    Attributes:
        name: Identifier.
        label: Name for a reader.
        split: The data it is measured on, `None` where it needs none or several.
        target: What kind of right value it has.
        found: Role -> value, spread and interval.
        right: Role -> the value it should have, empty where nothing can say.
        floor: The metric over retrained models.
        note: What every row says behind its comparison.
    """

    name: str
    label: str
    split: Split | None
    target: Target
    found: Mapping[ModelRole, Measured]
    right: Mapping[ModelRole, float]
    floor: NoiseFloor | None = None
    note: str = ""


def noise_floor(values: Sequence[float]) -> NoiseFloor | None:
    """Mean and spread of a metric over retrained models; `None` for fewer than two finite values.

    >>> noise_floor([0.5, 0.7]), noise_floor([0.5])
    (NoiseFloor(mean=0.6, spread=0.14142135623730948, count=2), None)
    """
    if len(values) < 2 or not all(math.isfinite(value) for value in values):
        return None
    return NoiseFloor(statistics.fmean(values), statistics.stdev(values), len(values))


def rows_of(metric: Metric) -> list[MetricValue]:
    """The rows of a metric, one a model."""
    rows = []
    for role in _ROLES:
        if role not in metric.found:
            continue
        found, right = metric.found[role], metric.right.get(role)
        gap = None if right is None else found.value - right
        words = [_words(role, found, right, gap, metric.target), metric.note]
        if metric.floor is not None and role != "retrained":
            words.append(f"Between trainings: {metric.floor}.")
        rows.append(
            MetricValue(
                name=metric.name,
                label=metric.label,
                model=role,
                split=metric.split,
                value=found.value,
                reference=right,
                gap=gap,
                target=metric.target,
                spread=found.spread,
                verdict=" ".join(filter(None, words)),
                interval=found.interval,
                noise_floor=metric.floor,
            )
        )
    return rows


def _words(role: ModelRole, found: Measured, right: float | None, gap: float | None, target: Target) -> str:
    value, spread = found.value, found.spread
    if role == "retrained":
        return "The reference."
    if right is None or gap is None:
        return "No retrained reference."
    if not math.isfinite(value):
        return "Not finite."
    if target != "retrained":
        return f"{value:.3g} where {right:.3g} is right."
    noise = "" if spread is None else f" (standard error {spread:.2g})"
    if gap == 0 or (spread is not None and abs(gap) <= 2 * spread):
        return f"Within two standard errors of {right:.3g}{noise}." if spread else f"Equal to {right:.3g}."
    return f"{abs(gap):.3g} {'above' if gap > 0 else 'below'} {right:.3g}{noise}."
