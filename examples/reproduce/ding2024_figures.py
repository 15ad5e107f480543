"""Pictures of the study."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from ding2024_linear import MODELS
from ding2024_settings import Preset
from ding2024_tables import COLUMNS, per_seed
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from studies import Row, save_figure

__all__ = ["draw_figures"]

_STYLES = {
    "original": ("black", "-"), "fine-tuned": ("tab:blue", "--"), "golden": ("tab:green", "-"),
    "A: overlap discarded": ("tab:red", "-"), "B: overlap kept": ("tab:orange", "-"),
}  # fmt: skip
_COLOURS = {"ICE-FT": "tab:blue", "CE-FT": "tab:red", "retain": "tab:orange", "forget": "tab:red"}
_NAMES = {"retain": "mask of retain", "forget": "mask of forget"}


def draw_figures(rows: Sequence[Row], preset: Preset, stem: Path) -> list[Path]:
    """Write `STEM-linear.png` and, for every data set, both sweeps.

    Args:
        rows: Rows of all jobs.
        preset: What was run.
        stem: Path without an ending.
    """
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    _linear(figure, [row for row in rows if row["kind"] == "linear"])
    written = [save_figure(figure, stem, "linear")]
    for task in preset.tasks:
        of_task = [row for row in rows if row["kind"] == "class" and row["task"] == task.dataset]
        for group, label in (("alpha", "alpha"), ("keep", "share kept")):
            figure = Figure(figsize=(13, 3.4), layout="constrained")
            _sweep(figure, of_task, group, label)
            figure.suptitle(task.dataset, fontsize=10)
            written.append(save_figure(figure, stem, f"{task.dataset.lower()}-{group}"))
    return written


def _band(axis: Axes, points: Sequence[tuple[float, list[float]]], colour: str, line: str, label: str) -> None:
    """The mean over seeds, and one standard deviation to both sides."""
    x, means = [value for value, _ in points], [statistics.fmean(values) for _, values in points]
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
    axis.plot(x, means, color=colour, linestyle=line, marker="o", markersize=3, label=label)
    low = [mean - width for mean, width in zip(means, spreads, strict=True)]
    high = [mean + width for mean, width in zip(means, spreads, strict=True)]
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _linear(figure: Figure, rows: Sequence[Row]) -> None:
    """RL above, UL below; over fine-tuning samples, shared features, and what masks of importances keep."""
    axes = figure.subplots(2, 3, sharex="col")
    columns: tuple[tuple[str, str, Sequence[str]], ...] = (
        ("tuned", "fine-tuning samples", MODELS),
        ("share", "share of shared features", MODELS),
        ("keep", "share of coefficients kept", ("retain", "forget")),
    )
    for column, (over, label, models) in enumerate(columns):
        chosen = [row for row in rows if row["over"] == over]
        values = sorted({row[over] for row in chosen})
        for line, (loss, title) in enumerate((("retain", "RL"), ("forget", "UL"))):
            axis = axes[line][column]
            for model in models:
                colour, style = _STYLES.get(model, (_COLOURS.get(model, "grey"), "-"))
                points = [
                    (value, [row[loss] for row in chosen if row["model"] == model and row[over] == value])
                    for value in values
                ]
                _band(axis, points, colour, style, _NAMES.get(model, model))
            axis.set(ylabel=title)
        axes[1][column].set_xlabel(label)
        axes[0][column].legend(fontsize=7)


def _sweep(figure: Figure, rows: Sequence[Row], group: str, label: str) -> None:
    """Every number of the table over what is varied; dotted: retrained, dashed: the original."""
    shown = [name for name in COLUMNS if name != "class_accuracy"]
    axes = figure.subplots(1, len(shown))
    chosen = [row for row in rows if row["group"] == group]
    percent: Callable[[list[float]], list[float]] = lambda values: [100 * value for value in values]  # noqa: E731
    for axis, name in zip(axes, shown, strict=True):
        for model in dict.fromkeys(row["model"] for row in chosen):
            of_model = [row for row in chosen if row["model"] == model]
            points = [
                (value, percent(per_seed([row for row in of_model if row["value"] == value], name)))
                for value in sorted({row["value"] for row in of_model})
            ]
            _band(axis, points, _COLOURS[model], "-", _NAMES.get(model, model))
        for model, line in (("retrained", ":"), ("original", "--")):
            level = statistics.fmean(percent(per_seed([row for row in rows if row["model"] == model], name)))
            axis.axhline(level, color="grey", linestyle=line, linewidth=1, label=model)
        values = sorted({row["value"] for row in chosen})
        axis.set(xlabel=label, title=f"{COLUMNS[name]}, %", xscale="log" if group == "alpha" else "linear")
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
    axes[0].legend(fontsize=7)
