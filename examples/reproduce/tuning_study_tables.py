"""Tables and pictures of `tuning_study.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from studies import Row, save_figure, spread, table

from lightning_unlearn import student_interval

__all__ = ["draw_figures", "sections"]

_GOALS = {"privacy": "privacy", "bias_removal": "bias removal"}


def _cases(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["dataset"], row["goal"]) for row in rows))


def _values(rows: Iterable[Row], what: str, name: str) -> list[float]:
    """One number a seed, by seed."""
    return [row[name] for row in sorted(rows, key=lambda row: row["seed"]) if row["what"] == what]


def _difference(rows: Sequence[Row], name: str) -> Any:
    """Tuned minus default, paired by seed, with Student's interval."""
    tuned, default = (torch.tensor(_values(rows, what, name)).double() for what in ("tuned", "default"))
    return student_interval(tuned - default)


def _of(rows: Sequence[Row], case: tuple[str, str]) -> dict[str, list[Row]]:
    chosen = [row for row in rows if (row["dataset"], row["goal"]) == case]
    return {
        method: [row for row in chosen if row["method"] == method]
        for method in dict.fromkeys(row["method"] for row in chosen)
    }


def verdict(low: float, high: float) -> str:
    """What an interval of a difference of errors says."""
    return "better" if high < 0 else "worse" if low > 0 else "undecided"


def sections(rows: Sequence[Row], figures: Sequence[Path]) -> list[str]:
    """The part of the page that the script writes."""
    parts = []
    for case in _cases(rows):
        dataset, goal = case
        found = _of(rows, case)
        lines, words = [], []
        for method, own in found.items():
            if not method:
                continue
            interval, tuning = _difference(own, "value"), _difference(own, "tuning_value")
            words.append(verdict(interval.low, interval.high))
            kept = sum(row["trial"] == 0 for row in own if row["what"] == "tuned")
            lines.append(
                [
                    method,
                    *(
                        spread(_values(own, what, name))
                        for name in ("goal_error", "test_error", "value")
                        for what in ("default", "tuned")
                    ),
                    f"{interval.mean:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})", words[-1],
                    f"{tuning.mean:+.4f}", f"{kept} of {len(own) // 2}",
                    spread(_values(own, "default", "pass_seconds")),
                ]
            )  # fmt: skip
        columns = [
            "method", "goal error, default", "tuned", "test error, default", "tuned", "J, default", "J, tuned",
            "difference of J (95 % interval)", "tuned is", "difference while tuning", "kept defaults", "s a pass",
        ]  # fmt: skip
        untuned = "; ".join(_reference(found[""], what) for what in ("original", "retrained"))
        counts = ", ".join(f"{words.count(word)} {word}" for word in ("better", "undecided", "worse"))
        parts += [
            f"## {dataset}, {_GOALS[goal]}",
            f"![differences]({next(one.name for one in figures if one.stem.endswith(f'-{dataset}-{goal}'))})",
            f"Without tuning: {untuned}. Of {len(words)} methods tuned settings are: {counts}.",
            "\n".join(table(columns, lines)),
        ]
    return parts


def _reference(rows: Sequence[Row], what: str) -> str:
    errors = (spread(_values(rows, what, name), scale=100) for name in ("forget", "validation"))
    return f"{what} {' % and '.join(errors)} % wrong on forgotten and test samples"


def draw_figures(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Write the differences of every case, method by method."""
    written = []
    for case in _cases(rows):
        methods = [(method, own) for method, own in _of(rows, case).items() if method]
        figure = Figure(figsize=(8, 1 + 0.35 * len(methods)), layout="constrained")
        axes = figure.add_subplot()
        for place, (_, own) in enumerate(reversed(methods)):
            interval = _difference(own, "value")
            reach = [[interval.mean - interval.low], [interval.high - interval.mean]]
            axes.errorbar([interval.mean], [place], xerr=reach, fmt="o", color="C0", capsize=3)
            tuned, default = (_values(own, what, "value") for what in ("tuned", "default"))
            axes.scatter([a - b for a, b in zip(tuned, default, strict=True)], [place] * len(tuned), s=8, color="grey")
        axes.set_yticks(range(len(methods)), [method for method, _ in reversed(methods)])
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel("J on test data, tuned minus default: left of 0 tuned is better")
        axes.set_title(f"{case[0]}, {_GOALS[case[1]]}")
        written.append(save_figure(figure, stem, f"{case[0]}-{case[1]}"))
    return written
