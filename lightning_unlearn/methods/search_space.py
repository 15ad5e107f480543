"""What tuning may vary of a method, as data: ranges of numbers and choices, by the name of the argument."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypeAlias

from lightning_unlearn.utilities.checks import expected

__all__ = ["Choices", "Dimension", "FloatRange", "IntRange", "Option", "SearchSpace"]

Option: TypeAlias = str | int | float | bool | None
"""One option of `Choices`: a plain value, so that it can be written to a file."""


@dataclass(frozen=True, slots=True)
class FloatRange:
    """Numbers from `low` to `high`, both included.

    Attributes:
        low: Smallest value.
        high: Largest value.
        log: Whether steps are factors, as for rates and weights of a loss; needs `low` above 0.

    Raises:
        ValueError: bounds that are not finite numbers or not in order, or `log` with a `low` of 0 or less.

    >>> rates = FloatRange(0.01, 1, log=True)
    >>> 0.1 in rates, 1.0 in rates, 2 in rates, "0.1" in rates, str(rates)
    (True, True, False, False, '0.01 to 1, log')
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(expected(name, "a finite number", value))
            object.__setattr__(self, name, float(value))
        _check_order(self.low, self.high, self.log)

    def __contains__(self, value: object) -> bool:
        return not isinstance(value, bool) and isinstance(value, Real) and self.low <= float(value) <= self.high

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}"


@dataclass(frozen=True, slots=True)
class IntRange:
    """Integers from `low` to `high`, both included.

    Attributes:
        low: Smallest value.
        high: Largest value.
        log: Whether steps are factors, as for numbers of steps; needs `low` above 0.

    Raises:
        ValueError: bounds that are not integers or not in order, or `log` with a `low` of 0 or less.

    >>> steps = IntRange(10, 150, log=True)
    >>> 50 in steps, 5 in steps, 50.0 in steps, str(steps)
    (True, False, False, '10 to 150, log')
    """

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(expected(name, "an integer", value, "Use FloatRange for other numbers."))
            object.__setattr__(self, name, int(value))
        _check_order(self.low, self.high, self.log)

    def __contains__(self, value: object) -> bool:
        return not isinstance(value, bool) and isinstance(value, Integral) and self.low <= int(value) <= self.high

    def __str__(self) -> str:
        return f"{self.low} to {self.high}{', log' if self.log else ''}"


@dataclass(frozen=True, slots=True)
class Choices:
    """One of some values that have no order.

    Attributes:
        options: The values: strings, numbers, truth values or `None`.

    Raises:
        ValueError: fewer than two options, two that are equal, or one of another kind.

    >>> stop = Choices(("held_out", "retain", None))
    >>> None in stop, "never" in stop, str(stop)
    (True, False, '"held_out", "retain" or None')
    """

    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        given: object = self.options
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ValueError(expected("options", "a tuple of values", given, "One option is no choice."))
        object.__setattr__(self, "options", tuple(given))
        for option in self.options:
            plain = option is None or isinstance(option, str | int | float)
            if not plain or (isinstance(option, float) and not math.isfinite(option)):
                raise ValueError(expected("options", "strings, finite numbers, truth values or None", option))
        # Equal as Python sees them: 1, 1.0 and True would be one key in a table of trials.
        if len(set(self.options)) < len(self.options) or len(self.options) < 2:
            raise ValueError(expected("options", "at least two values, all different", self.options))

    def __contains__(self, value: object) -> bool:
        return any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in self.options)

    def __str__(self) -> str:
        shown = [f'"{option}"' if isinstance(option, str) else str(option) for option in self.options]
        return f"{', '.join(shown[:-1])} or {shown[-1]}"


Dimension: TypeAlias = FloatRange | IntRange | Choices
"""What one argument may be."""

SearchSpace: TypeAlias = Mapping[str, Dimension]
"""Name of an argument -> what it may be; every combination is one that the method takes."""


def _check_order(low: float, high: float, log: bool) -> None:
    if not low < high:
        raise ValueError(expected("high", f"above `low`, {low}", high))
    if log and low <= 0:
        raise ValueError(expected("low", "above 0 for `log=True`", low, "Leave `log` out, or begin above 0."))
