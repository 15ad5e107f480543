"""Reading the rows of `gogineni2024.py`: which belong together, and two comparisons that tables and figures share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

__all__ = ["MARGIN", "at_equal_forgetting", "chosen", "file_label", "own_forgets_more", "seeds_of", "values"]

Row = dict[str, Any]
MARGIN = 0.05
"""Forget accuracy by which the own subtraction must lie below the placebo's; chosen before anything was run."""


def file_label(task: str) -> str:
    """A task's name as part of a file's name."""
    return task.lower()


def chosen(rows: Iterable[Row], **labels: Any) -> list[Row]:
    """The rows that carry these labels."""
    return [row for row in rows if all(row.get(name) == value for name, value in labels.items())]


def values(rows: Iterable[Row], name: str, **labels: Any) -> list[float | None]:
    """One quantity of the rows that carry these labels."""
    return [row.get(name) for row in chosen(rows, **labels)]


def seeds_of(rows: Iterable[Row]) -> list[int]:
    """The seeds, in order."""
    return sorted({row["seed"] for row in rows})


def own_forgets_more(rows: Sequence[Row]) -> str:
    """In how many seeds the own subtraction left at least `MARGIN` less forget accuracy than the placebo's did.

    Args:
        rows: Of one way, keep and repair, both roles.
    """
    found = {(row["seed"], row["role"]): row["forget_accuracy"] for row in rows}
    seeds = seeds_of(rows)
    return f"{sum(found[seed, 'placebo'] - found[seed, 'own'] >= MARGIN for seed in seeds)} of {len(seeds)}"


def at_equal_forgetting(
    rows: Sequence[Row], reference: Callable[[Row], bool], name: str = "test_accuracy"
) -> list[float]:
    """A quantity of some models minus that of the reference models of their seed that forgot as much.

    The reference is a line through the untouched model and the reference models, by forget accuracy; of several that
    forgot exactly as much the best, which is what one would choose. Models that forgot more than any of these, or less,
    are left out, and so are references themselves.

    Args:
        rows: Models of one forget set, the untouched ones among them.
        reference: Whether a row is a reference.
        name: The quantity.

    Returns:
        One difference for each model.
    """
    differences = []
    for seed in seeds_of(rows):
        of_seed = chosen(rows, seed=seed)
        points: dict[float, float] = {}
        for row in of_seed:
            if row["way"] == "untouched" or reference(row):
                forgot = row["forget_accuracy"]
                points[forgot] = max(row[name], points.get(forgot, row[name]))
        x = sorted(points)
        y = [points[one] for one in x]
        for row in of_seed:
            if row["way"] in ("untouched", "retrained") or reference(row):
                continue
            if x[0] <= row["forget_accuracy"] <= x[-1]:
                differences.append(row[name] - float(np.interp(row["forget_accuracy"], x, y)))
    return differences
