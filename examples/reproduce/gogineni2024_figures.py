"""Pictures of the study: lines are means over seeds, bands and bars their standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from gogineni2024_analysis import chosen, file_label, seeds_of, values
from gogineni2024_runs import OBJECTIVES
from gogineni2024_settings import PLACEMENTS, PRUNES, SETS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from studies import Row, save_figure

__all__ = ["draw_figures"]

_PANELS = (
    ("test_accuracy", "test accuracy"), ("forget_accuracy", "forget accuracy"), ("membership_auroc", "membership AUROC")
)  # fmt: skip
_COLOURS = dict(zip([*PRUNES, "placebo"], ("tab:blue", "tab:green", "tab:orange", "tab:red"), strict=True))
_FORMS = {
    "smaller rate": "black", "magnitude": "tab:blue", "random": "tab:orange", "cyclic": "tab:green",
    "fixed": "tab:purple",
}  # fmt: skip


def draw_figures(rows: Sequence[Row], tasks: Sequence[str], stem: Path) -> list[Path]:
    """Write `STEM-storage.png` and, for every task, what comes of fractions kept and fractions updated.

    Args:
        rows: With the labels of their jobs.
        tasks: Names of the tasks.
        stem: Path without an ending.
    """
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    _storage(figure.subplots(), rows, tasks)
    written = [save_figure(figure, stem, "storage")]
    for task in tasks:
        of_task, label = chosen(rows, task=task), file_label(task)
        figure = Figure(figsize=(11, 12), layout="constrained")
        _keeps(figure, of_task, task)
        written.append(save_figure(figure, stem, f"{label}-keep"))
        for name in SETS:
            figure = Figure(figsize=(11, 12), layout="constrained")
            _fractions(figure, chosen(of_task, kind="updates", set=name), f"{task}, {name}")
            written.append(save_figure(figure, stem, f"{label}-fraction-{name}"))
        figure = Figure(figsize=(13, 6.4), layout="constrained")
        _prices(figure, chosen(of_task, kind="updates"), task)
        written.append(save_figure(figure, stem, f"{label}-price"))
    return written


def _line(axis: Axes, rows: Iterable[Row], x: str, name: str, colour: str, style: str, label: str) -> None:
    """Mean and standard deviation over seeds, by `x`."""
    points: dict[float, list[float]] = {}
    for row in rows:
        if row.get(name) is not None:
            points.setdefault(row[x], []).append(row[name])
    if not points:
        return
    places = sorted(points)
    means = [statistics.fmean(points[one]) for one in places]
    off = [statistics.stdev(points[one]) if len(points[one]) > 1 else 0.0 for one in places]
    axis.plot(places, means, color=colour, linestyle=style, marker="o", markersize=3, linewidth=1.2, label=label)
    low, high = zip(*((mean - one, mean + one) for mean, one in zip(means, off, strict=True)), strict=True)
    axis.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)


def _references(axis: Axes, rows: Sequence[Row], name: str) -> None:
    for way, style in (("untouched", "-"), ("retrained", "--")):
        found = [one for one in values(rows, name, way=way) if one is not None]
        if found:
            axis.axhline(statistics.fmean(found), color="grey", linewidth=0.9, linestyle=style, label=way)


def _keeps(figure: Figure, rows: Sequence[Row], task: str) -> None:
    """Accuracy and membership over the fraction that is subtracted; amnesiac is the right end of every line."""
    cases = [(placement, name) for placement in PLACEMENTS for name in SETS]
    axes = figure.subplots(len(cases), len(_PANELS), sharex=True, squeeze=False)
    for (placement, part), line in zip(cases, axes, strict=True):
        of_set = chosen(rows, kind="amnesiac", placement=placement, set=part)
        full = chosen(of_set, way="amnesiac")
        for (name, title), axis in zip(_PANELS, line, strict=True):
            _references(axis, of_set, name)
            for way in PRUNES:
                both = [*chosen(of_set, way=way), *full]
                _line(axis, chosen(both, role="own", repaired=False), "keep", name, _COLOURS[way], "-", way)
            both = [*chosen(of_set, way="step, magnitude"), *full]
            blue, red = _COLOURS["step, magnitude"], _COLOURS["placebo"]
            _line(axis, chosen(both, role="own", repaired=True), "keep", name, blue, "--", "step, repaired")
            _line(axis, chosen(both, role="placebo", repaired=False), "keep", name, red, "-", "placebo, step")
            _line(axis, chosen(both, role="placebo", repaired=True), "keep", name, red, "--", "placebo, repaired")
            axis.set(xscale="log", title=f"{placement}, {part}: {title}")
    for axis in axes[-1]:
        axis.set_xlabel("fraction of each layer kept")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"{task}: partial amnesiac", fontsize=11)


def _fractions(figure: Figure, rows: Sequence[Row], title: str) -> None:
    """Accuracy and membership over the fraction that a step may change, or to which the rate is lowered."""
    axes = figure.subplots(len(OBJECTIVES), len(_PANELS), sharex=True, squeeze=False)
    for objective, line in zip(OBJECTIVES, axes, strict=True):
        of_objective = chosen(rows, objective=objective)
        for (name, label), axis in zip(_PANELS, line, strict=True):
            _references(axis, rows, name)
            for form, colour in _FORMS.items():
                found = chosen(of_objective, form=form)
                if found:
                    _line(axis, [*found, *chosen(of_objective, form="naive")], "fraction", name, colour, "-", form)
            axis.set(xscale="log", title=f"{objective}: {label}")
            axis.title.set_fontsize(8)
    for axis in axes[-1]:
        axis.set_xlabel("fraction (1: naive)")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(title, fontsize=11)


def _prices(figure: Figure, rows: Sequence[Row], task: str) -> None:
    """Test accuracy against forget accuracy: whether masks buy more than a smaller rate does."""
    axes = figure.subplots(len(SETS), len(OBJECTIVES), squeeze=False)
    for part, line in zip(SETS, axes, strict=True):
        for objective, axis in zip(OBJECTIVES, line, strict=True):
            of_set = chosen(rows, set=part)
            for form, colour in {**_FORMS, "naive": "tab:red"}.items():
                found = chosen(of_set, objective=objective, form=form)
                _cloud(axis, found, colour, "o", form)
            _cloud(axis, chosen(of_set, way="untouched"), "grey", "s", "untouched")
            _cloud(axis, chosen(of_set, way="retrained"), "grey", "*", "retrained")
            axis.set(xlabel="forget accuracy", ylabel="test accuracy", title=f"{part}: {objective}")
            axis.title.set_fontsize(8)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"{task}: what forgetting costs, a point for each fraction, bars over {len(seeds_of(rows))} seeds")


def _cloud(axis: Axes, rows: Sequence[Row], colour: str, marker: str, label: str) -> None:
    for place, fraction in enumerate(dict.fromkeys(row.get("fraction") for row in rows)):
        part = [row for row in rows if row.get("fraction") == fraction]
        x, y = [row["forget_accuracy"] for row in part], [row["test_accuracy"] for row in part]
        off = [statistics.stdev(one) if len(one) > 1 else 0.0 for one in (x, y)]
        axis.errorbar(
            statistics.fmean(x), statistics.fmean(y), xerr=off[0], yerr=off[1], color=colour, marker=marker,
            markersize=4, linewidth=0.6, alpha=0.8, label=None if place else label,
        )  # fmt: skip


def _storage(axis: Axes, rows: Sequence[Row], tasks: Sequence[str]) -> None:
    """Bytes on disk over the fraction kept."""
    for task, colour in zip(tasks, ("tab:blue", "tab:orange"), strict=False):
        found = [{**row, "mebibytes": row["bytes_on_disk"] / 2**20} for row in chosen(rows, kind="storage", task=task)]
        _line(axis, found, "keep", "mebibytes", colour, "-", f"{task}, all steps")
    axis.set(xscale="log", yscale="log", xlabel="fraction of each layer kept", ylabel="MiB on disk")
    axis.legend(fontsize=7)
