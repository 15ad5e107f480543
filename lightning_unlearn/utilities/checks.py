"""Argument checks that build the one error sentence of the package.

*Expected `name` to be <rule>, but got <value>. <What to do.>*
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any, TypeVar

__all__ = ["check_choice", "check_fraction", "check_positive", "check_positive_int", "expected", "shorten"]

T = TypeVar("T")


def expected(name: str, rule: str, got: Any, remedy: str = "") -> str:
    """Build the error sentence.

    >>> expected("keep", "a fraction in (0, 1]", 0, "Use 1.0 to keep everything.")
    'Expected `keep` to be a fraction in (0, 1], but got 0. Use 1.0 to keep everything.'
    """
    return f"Expected `{name}` to be {rule}, but got {got!r}.{' ' + remedy if remedy else ''}"


def shorten(values: Iterable[Any], limit: int = 5) -> str:
    """List at most `limit` values and count the rest.

    >>> shorten(range(7))
    '0, 1, 2, 3, 4 and 2 more'
    """
    items = list(values)
    shown = ", ".join(repr(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def check_choice(name: str, value: T, allowed: Collection[T]) -> T:
    """Return `value`, or raise `ValueError` naming the allowed values.

    >>> check_choice("scope", "layer", ("layer", "global"))
    'layer'
    """
    if value not in allowed:
        raise ValueError(expected(name, f"one of {', '.join(repr(item) for item in allowed)}", value))
    return value


def check_fraction(name: str, value: object, *, zero: bool = False) -> float:
    """Return `value` as a float in (0, 1] (or [0, 1] with `zero`), or raise `ValueError`.

    >>> check_fraction("keep", 1)
    1.0
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not (0 < float(value) <= 1 or (zero and value == 0)):
        raise ValueError(expected(name, f"a fraction in {'[' if zero else '('}0, 1]", value))
    return float(value)


def check_positive(name: str, value: object, *, zero: bool = False) -> float:
    """Return `value` as a finite float above zero (or zero as well with `zero`), or raise `ValueError`.

    >>> check_positive("alpha", 2)
    2.0
    """
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
        raise ValueError(expected(name, f"a finite number {'of at least' if zero else 'above'} 0", value))
    return number


def check_positive_int(name: str, value: object, *, zero: bool = False) -> int:
    """Return `value` as an int of at least one (or zero with `zero`), or raise `ValueError`.

    >>> check_positive_int("max_steps", 50)
    50
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < (0 if zero else 1):
        raise ValueError(expected(name, f"an integer of at least {0 if zero else 1}", value))
    return int(value)
