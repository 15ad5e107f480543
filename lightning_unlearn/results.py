"""Typed results: what was measured, what it should have been, and what follows in words.

Everything is frozen and can be written as JSON with `to_dict`. Results are produced by `procedures` and read by
`report`; nothing here trains, evaluates or formats.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning_unlearn.types import Split

__all__ = ["EvaluationResult", "MetricValue", "ModelRole", "NoiseFloor", "Outcome", "StageResult", "Target", "to_dict"]

ModelRole: TypeAlias = Literal["original", "unlearned", "retrained", "placebo"]
Target: TypeAlias = Literal["high", "low", "retrained"]
"""Which value of a metric is right: an extreme, or the retrained model's."""

Outcome: TypeAlias = Literal[
    "forgotten",
    "partly_forgotten",
    "not_forgotten",
    "over_forgotten",
    "not_specific",
    "unconfirmed",
    "nothing_to_forget",
    "damaged",
    "unknown",
]
"""What the evidence allows to be said; `procedures.verdict.decide` holds the rule."""


def to_dict(value: Any) -> Any:
    """Turn a result into what `json.dumps(..., allow_nan=False)` accepts.

    Dataclasses and mappings become dictionaries, sequences lists, enums their values, paths strings; a float that is
    not finite becomes the string `"nan"`, `"inf"` or `"-inf"`, since JSON has no word for it.

    Raises:
        TypeError: something is none of these, such as a tensor.

    >>> to_dict({"a": (1, math.inf), "b": None})
    {'a': [1, 'inf'], 'b': None}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_dict(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return to_dict(value.value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_dict(item) for item in value]
    raise TypeError(f"Expected `value` to be made of plain data, but got {type(value).__name__}.")


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """What a metric does from one retraining to another; what differs no more than that shows nothing.

    Attributes:
        mean: Mean of the metric over retrained models; of a distance, over those it was measured from to the first.
        spread: Standard deviation over them (unbiased).
        count: How many numbers it was computed from, at least two.

    >>> print(NoiseFloor(0.5, 0.012, 3))
    0.5 ± 0.012 (3)
    """

    mean: float
    spread: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.spread:.2g} ({self.count})"


@dataclass(frozen=True, slots=True)
class MetricValue:
    """One metric of one model.

    Attributes:
        name: Identifier, such as `"forget_accuracy"`.
        label: Name for a reader, such as `"Accuracy on the forget set"`.
        model: Which of the compared models was measured.
        split: The data it was measured on, `None` where it needs none or several.
        value: What was measured.
        reference: The value it should have, `None` where nothing can say.
        gap: `value - reference`, or `None`.
        target: What kind of right value the metric has.
        spread: Standard error of `value` over the samples of this evaluation, or `None`.
        verdict: The comparison in words.
        interval: Ends of a 95 % interval for `value` over samples, or `None` where none can be given; it does not
            contain the noise between trainings.
        noise_floor: The metric over retrained models, `None` where fewer than two numbers of it are there.
    """

    name: str
    label: str
    model: ModelRole
    split: Split | None
    value: float
    reference: float | None
    gap: float | None
    target: Target
    spread: float | None
    verdict: str
    interval: tuple[float, float] | None = None
    noise_floor: NoiseFloor | None = None


@dataclass(frozen=True, slots=True)
class StageResult:
    """One stage of a forgetting pass.

    Attributes:
        name: What ran, such as `"amnesiac"`, `"batch_norm"` or `"FineTune"`.
        seconds: Wall time.
        steps: Optimizer steps taken, or recorded steps subtracted.
        probe_before: Metric name -> value on the probe before the stage.
        probe_after: The same after it.
        relative_change: L2 norm of the stage's change of the weights, divided by the norm of the weights before it.
    """

    name: str
    seconds: float
    steps: int
    probe_before: Mapping[str, float] = field(default_factory=dict)
    probe_after: Mapping[str, float] = field(default_factory=dict)
    relative_change: float | None = None


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """A comparison of an unlearned model with what it should be.

    Attributes:
        rows: One entry per metric and model, metrics in reading order.
        models: The models that were compared.
        samples: Split -> number of samples it was measured on.
        something_to_forget: Whether the original had measurably memorised the forget set; `None` if that is not known.
        outcome: What the evidence allows to be said.
        verdict: The same in plain words.
        removed: Share of the memorisation that is gone (1 = all, negative = more than before), `None` if undefined.
        removed_by_placebo: The same for the placebo.
        notes: What to keep in mind when reading the numbers.
        warnings: Comparisons that are not valid, and why.
        costs: Name -> number, such as `"unlearning_seconds"`, `"speedup"` or `"store_bytes"`.
        seconds: How long the evaluation took.
    """

    rows: tuple[MetricValue, ...]
    models: tuple[ModelRole, ...]
    samples: Mapping[str, int]
    something_to_forget: bool | None
    outcome: Outcome
    verdict: str
    removed: float | None = None
    removed_by_placebo: float | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def metrics(self) -> dict[str, str]:
        """Name -> label of the metrics that were measured, in reading order."""
        return {row.name: row.label for row in self.rows}

    def row(self, name: str) -> dict[ModelRole, MetricValue]:
        """One metric, by model.

        Raises:
            KeyError: the metric was not measured; the message names those that were.
        """
        found = {row.model: row for row in self.rows if row.name == name}
        if not found:
            raise KeyError(f"Expected `name` to be one of {', '.join(self.metrics())}, but got {name!r}.")
        return found

    def value(self, name: str, model: ModelRole = "unlearned") -> float:
        """The value of one metric for one model.

        Raises:
            KeyError: it was not measured.
        """
        return self.row(name)[model].value

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data for JSON."""
        return dict(to_dict(self))
