"""Pictures of the study."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from alon_dar2025_regions import unpacked
from alon_dar2025_settings import GOALS, METHODS
from alon_dar2025_tables import file_label, of
from images import CLASS_NAMES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from studies import Row, save_figure

from lightning_unlearn.report import draw_decision_plane

__all__ = ["draw_figures"]

_GOAL_ERRORS = {
    "privacy": "|forget error - test error|",
    "bias_removal": "given wrong labels that remain",
}
_REFERENCES = {"original": ("black", "--"), "retrained": ("tab:green", ":")}


def draw_figures(rows: Sequence[Row], tasks: Sequence[Row], settings: Row, stem: Path) -> list[Path]:
    """Write, for every task, errors against width, decision regions against width, and planes.

    Args:
        rows: Of all jobs, each with its task, width and seed.
        tasks: Settings of the tasks, with their names.
        settings: Of the preset.
        stem: Path without an ending.
    """
    written = []
    for task in tasks:
        label, mine = file_label(task["name"]), of(rows, task=task["name"])
        for kind, field in (("test-error", "test_error"), ("goal-error", "goal_error")):
            figure = _against_width(mine, task, settings["lambdas"], field)
            written.append(save_figure(figure, stem, f"{label}-{kind}"))
        written.append(save_figure(_regions(mine, task, settings["shown_lambda"]), stem, f"{label}-regions"))
        for name, figure in _planes(mine, task, settings["shown_lambda"]):
            written.append(save_figure(figure, stem, f"{label}-plane-{name}"))
    return written


def _line(axis: Axes, rows: Sequence[Row], widths: Sequence[int], field: str, **style: object) -> None:
    """Mean over seeds with one standard deviation, in percent."""
    found = [[100 * row[field] for row in of(rows, width=width) if row.get(field) is not None] for width in widths]
    kept = [(width, values) for width, values in zip(widths, found, strict=True) if values]
    means = [statistics.fmean(values) for _, values in kept]
    bars = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in kept]
    axis.errorbar([width for width, _ in kept], means, bars, elinewidth=0.8, capsize=2, **style)


def _grid(task: Row, title: str) -> tuple[Figure, Iterator[tuple[Axes, str, str]]]:
    """A row of panels for each goal, a column for each method."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(len(GOALS), len(METHODS), sharex=True, sharey="row")
    figure.suptitle(f"{task['name']}: {title}", fontsize=11)

    def panels() -> Iterator[tuple[Axes, str, str]]:
        for line, goal in zip(axes, GOALS, strict=True):
            for axis, method in zip(line, METHODS, strict=True):
                axis.set_title(f"{GOALS[goal]}: {method}", fontsize=10)
                axis.set_xscale("log", base=2)
                axis.set_xticks(task["widths"], [str(width) for width in task["widths"]])
                axis.minorticks_off()
                axis.grid(alpha=0.3)
                if goal == list(GOALS)[-1]:
                    axis.set_xlabel("width k")
                yield axis, goal, method

    return figure, panels()


def _finished(figure: Figure, *, from_zero: bool) -> Figure:
    # At the end, for rows of panels share an axis, whose top would stay where the first panel has it.
    for axis in figure.axes if from_zero else ():
        axis.set_ylim(bottom=0)
    figure.axes[0].legend(fontsize=8)
    return figure


def _against_width(rows: Sequence[Row], task: Row, lambdas: Sequence[float], field: str) -> Figure:
    """One quantity against width; the marker grows with lambda."""
    titles = {"test_error": "test error after tuned unlearning", "goal_error": "how far the goal is missed"}
    figure, panels = _grid(task, titles[field])
    for axis, goal, method in panels:
        here = of(rows, kind="model", goal=goal)
        for model, (colour, style) in _REFERENCES.items():
            chosen = of(here, model=model)
            _line(axis, chosen, task["widths"], field, color=colour, linestyle=style, label=model, linewidth=1.2)
        for place, weight in enumerate(lambdas):
            chosen = of(here, model=method, **{"lambda": weight})
            size = 4 + 3.5 * place
            _line(
                axis, chosen, task["widths"], field, color="tab:blue", alpha=0.75, marker="o", markersize=size,
                markerfacecolor="none", linewidth=0.8, label=f"lambda {weight:g}",
            )  # fmt: skip
        if method == METHODS[0]:
            axis.set_ylabel("test error, %" if field == "test_error" else f"{_GOAL_ERRORS[goal]}, %", fontsize=9)
    return _finished(figure, from_zero=field == "goal_error")


def _regions(rows: Sequence[Row], task: Row, shown: float) -> Figure:
    """Share of points that are answered differently, near forgotten and near held-out images."""
    figure, panels = _grid(task, f"points near forgotten and near other images that change class (lambda {shown:g})")
    for axis, goal, method in panels:
        here = of(rows, kind="model", goal=goal)
        lines: Mapping[str, tuple[list[Row], str]] = {
            "unlearned": (of(here, model=method, **{"lambda": shown}), "tab:blue"),
            "retrained": (of(here, model="retrained"), "tab:green"),
        }
        for model, (chosen, colour) in lines.items():
            for field, style in (("near_change", "-"), ("far_change", "--")):
                label = f"{model}, {'near forgotten' if field == 'near_change' else 'near others'}"
                _line(axis, chosen, task["widths"], field, color=colour, linestyle=style, marker="o", markersize=4,
                      label=label, linewidth=1.2)  # fmt: skip
        if method == METHODS[0]:
            axis.set_ylabel("points that change class, %", fontsize=9)
    return _finished(figure, from_zero=True)


def _planes(rows: Sequence[Row], task: Row, shown: float) -> Iterator[tuple[str, Figure]]:
    """Decision regions around the first forgotten image of the first seed, for the narrowest and the widest network."""
    names = CLASS_NAMES[task["dataset"]]
    for row in of(rows, kind="plane"):
        goal, true = GOALS[row["goal"]], names[row["true_label"]]
        which = "narrowest" if row["width"] == min(task["widths"]) else "widest"
        aside = f" (in truth: {true})" if row["goal"] == "bias_removal" else ""
        title = (
            f"{task['name']}, {goal}, {which} network (width {row['width']}): answers around a forgotten image{aside}, "
            f"before and after forgetting (lambda {shown:g})"
        )
        figure = draw_decision_plane(unpacked(row), class_names=names, labels=row["labels"], title=title)
        yield f"{file_label(goal)}-{which}", figure
