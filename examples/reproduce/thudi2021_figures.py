"""Pictures of the study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from studies import Row, save_figure
from thudi2021_analysis import WHEN, file_label, grid_rows, last_rows, seeds_of

__all__ = ["draw_figures"]

_MARKERS = "os^DvP*X<>"
_COLOURS = ("tab:blue", "tab:orange")


def draw_figures(jobs: Sequence[tuple[str, Row]], tasks: Sequence[dict[str, Any]], stem: Path) -> list[Path]:
    """Write `STEM-toy.png` and, for every task, its grid, its penalties and their price.

    Args:
        jobs: Kind of the job, and one of its rows.
        tasks: Settings of the tasks.
        stem: Path without an ending.
    """
    written = []
    toys = [row for kind, row in jobs if kind == "toy"]
    if toys:
        figure = Figure(figsize=(9, 4), layout="constrained")
        _scatter(figure, toys, "Softmax regression")
        written.append(save_figure(figure, stem, "toy"))
    rows = [row for kind, row in jobs if kind == "tune"]
    for task in tasks:
        name, label = task["name"], file_label(task["name"])
        grid = grid_rows(rows, name)
        if grid:
            figure = Figure(figsize=(9, 4), layout="constrained")
            _scatter(figure, grid, name)
            written.append(save_figure(figure, stem, f"{label}-grid"))
        kinds = {kind: last_rows(rows, name, task["penalty_rate"], from_start=kind == "start") for kind in WHEN}
        if task["gammas"]:
            figure = Figure(figsize=(12, 3.6), layout="constrained")
            _penalties(figure, kinds, f"{name}, learning rate {task['penalty_rate']:g}")
            written.append(save_figure(figure, stem, f"{label}-penalty"))
        if grid and task["gammas"]:
            figure = Figure(figsize=(9, 4), layout="constrained")
            _prices(figure, grid, kinds, name)
            written.append(save_figure(figure, stem, f"{label}-price"))
    return written


def _scatter(figure: Figure, rows: Sequence[Row], title: str) -> None:
    """Verification errors against the unlearning error: colours are learning rates, shapes are numbers of epochs."""
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    rates, epochs = sorted({row["lr"] for row in rows}), sorted({row["epochs"] for row in rows})
    colours = [mpl.colormaps["viridis"](0.95 * place / max(len(rates) - 1, 1)) for place in range(len(rates))]
    for axis, (target, kind) in zip(axes, (("v_single", "single gradient"), ("v_original", "untouched")), strict=True):
        for lr, colour in zip(rates, colours, strict=True):
            for count, marker in zip(epochs, _MARKERS, strict=False):
                chosen = [row for row in rows if row["lr"] == lr and row["epochs"] == count]
                x, y = [row["error"] for row in chosen], [row[target] for row in chosen]
                axis.scatter(x, y, s=16, color=colour, marker=marker, alpha=0.75, linewidths=0)
        _equal_line(axis, rows)
        axis.set(xscale="log", yscale="log", xlabel="unlearning error e", title=f"{title}: {kind}")
    axes[0].set_ylabel("verification error v")
    for lr, colour in zip(rates, colours, strict=True):
        axes[1].scatter([], [], color=colour, label=f"lr {lr:g}")
    for count, marker in zip(epochs, _MARKERS, strict=False):
        axes[1].scatter([], [], color="grey", marker=marker, label=f"{count} epochs" if count > 1 else "1 epoch")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _equal_line(axis: Axes, rows: Sequence[Row]) -> None:
    ends = [min(row["error"] for row in rows), max(row["error"] for row in rows)]
    axis.plot(ends, ends, color="black", linewidth=0.8, linestyle="--", label="v = e")


def _penalties(figure: Figure, kinds: Mapping[str, Sequence[Row]], title: str) -> None:
    """Errors and accuracy over gamma, a thin line for each seed and the mean."""
    axes = figure.subplots(1, 4)
    panels = (
        ("error", "unlearning error e"), ("v_single", "v, single gradient"), ("v_original", "v, untouched"),
        ("test_accuracy_original", "test accuracy"),
    )  # fmt: skip
    for (kind, rows), colour in zip(kinds.items(), _COLOURS, strict=True):
        gammas = sorted({row["gamma"] for row in rows})
        for axis, (name, label) in zip(axes, panels, strict=True):
            for seed in seeds_of(rows):
                line = sorted((row["gamma"], row[name]) for row in rows if row["seed"] == seed)
                axis.plot(*zip(*line, strict=True), color=colour, alpha=0.35, linewidth=1)
            means = [statistics.fmean(row[name] for row in rows if row["gamma"] == gamma) for gamma in gammas]
            axis.plot(gammas, means, color=colour, marker="o", markersize=4, label=WHEN[kind])
            axis.set(xlabel="gamma (paper's form)", title=label)
            if name != "test_accuracy_original":
                axis.set_yscale("log")
    axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)


def _prices(figure: Figure, grid: Sequence[Row], kinds: Mapping[str, Sequence[Row]], title: str) -> None:
    """Test accuracy against errors: what penalties buy, beside what a smaller learning rate or fewer epochs buy."""
    axes = figure.subplots(1, 2, sharey=True)
    panels = (("error", "unlearning error e"), ("v_single", "v, single gradient"))
    for axis, (name, label) in zip(axes, panels, strict=True):
        points = [(row[name], row["test_accuracy_original"]) for row in grid]
        axis.scatter(*zip(*points, strict=True), s=14, color="grey", alpha=0.6, label="no penalty: every lr, epoch")
        for (kind, rows), colour in zip(kinds.items(), _COLOURS, strict=True):
            chosen = [row for row in rows if row["gamma"] > 0]
            x, y = [row[name] for row in chosen], [row["test_accuracy_original"] for row in chosen]
            sizes = [10 + 40 * row["gamma"] ** 0.5 for row in chosen]
            axis.scatter(x, y, s=sizes, facecolors="none", edgecolors=colour, label=f"penalty {WHEN[kind]}")
        axis.set(xscale="log", xlabel=label, title=title)
    axes[0].set_ylabel("test accuracy")
    axes[1].legend(fontsize=7, title="larger circle: larger gamma", title_fontsize=7)
