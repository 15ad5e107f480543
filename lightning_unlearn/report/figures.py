"""Figures for reports: dots and bars over repetitions, as SVG that follows the page's light or dark colours."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_unlearn.report.content import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Panel", "bar_figure", "dot_figure"]

# Matplotlib needs real colours; these two are found again in its output and replaced by the page's own.
_TEXT, _LINE = "#010203", "#040506"
_BLUE, _GREY, _GREEN = "#3f7fd1", "#8b95a5", "#2a9d6f"
_ROW_HEIGHT, _WIDTH = 0.34, 8.4


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity, for the same rows as the other panels of a figure.

    Attributes:
        title: Name and unit.
        values: Row label -> one value a repetition.
        target: The right value, marked by a line; `None` if there is none.
        limits: Range of the axis, by default from the data.
    """

    title: str
    values: Mapping[str, Sequence[float]]
    target: float | None = None
    limits: tuple[float, float] | None = None


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _style(axes: Axes, title: str, labels: Sequence[str], *, named: bool) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_TEXT, pad=10, parse_math=False)
    axes.set_yticks(range(len(labels)), labels if named else [""] * len(labels), parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(length=0, labelsize=9, colors=_TEXT)
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _target(axes: Axes, target: float | None) -> None:
    if target is not None:
        axes.axvline(target, color=_GREEN, linewidth=1.4, linestyle=(0, (4, 2)), zorder=1)


def _svg(figure: Any, title: str) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT, "currentColor").replace(_LINE, "var(--line, #8884)")
    # The same ids in two figures of a page would make one of them use the other's clip paths.
    prefix = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    # The size is the page's business: the view box keeps the proportions.
    opening, rest = svg.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", opening) + ">" + rest


def _described(panels: Sequence[Panel]) -> str:
    parts = []
    for panel in panels:
        means = {label: _finite(values) for label, values in panel.values.items()}
        shown = ", ".join(f"{label} {statistics.fmean(found):.3g}" for label, found in means.items() if found)
        target = "" if panel.target is None else f" (target {panel.target:.3g})"
        parts.append(f"{panel.title}{target}: {shown}.")
    return " ".join(parts)


def dot_figure(title: str, panels: Sequence[Panel], *, muted: Collection[str] = (), caption: str = "") -> Figure:
    """One row a label, one panel a quantity: a large dot for the mean, small ones for the repetitions.

    Args:
        title: Heading of the figure.
        panels: At least one; the first one's labels name the rows.
        muted: Labels to draw in grey, such as references and controls.
        caption: What to see.

    Returns:
        The figure; its description holds the means as text.
    """
    from matplotlib.figure import Figure as Canvas

    labels = list(panels[0].values)
    height = 0.75 + _ROW_HEIGHT * len(labels)
    canvas = Canvas(figsize=(_WIDTH, height), layout="constrained")
    grid = canvas.subplots(1, len(panels), squeeze=False)
    for number, (axes, panel) in enumerate(zip(grid[0], panels, strict=True)):
        _style(axes, panel.title, labels, named=number == 0)
        _target(axes, panel.target)
        for position, label in enumerate(labels):
            found = _finite(panel.values.get(label, ()))
            colour = _GREY if label in muted else _BLUE
            axes.scatter(found, [position] * len(found), s=14, color=colour, alpha=0.45, linewidths=0, zorder=2)
            if found:
                axes.scatter([statistics.fmean(found)], [position], s=52, color=colour, linewidths=0, zorder=3)
        if panel.limits is not None:
            margin = 0.04 * (panel.limits[1] - panel.limits[0])
            axes.set_xlim(panel.limits[0] - margin, panel.limits[1] + margin)
    return Figure(title, _svg(canvas, title), caption, _described(panels))


def bar_figure(title: str, panel: Panel, *, muted: Collection[str] = (), caption: str = "") -> Figure:
    """A bar a label for the mean, with a whisker of one standard deviation where there are repetitions.

    Args:
        title: Heading of the figure.
        panel: The quantity; bars start at zero, so it should not be negative.
        muted: Labels to draw in grey.
        caption: What to see.

    Returns:
        The figure; its description holds the means as text.
    """
    from matplotlib.figure import Figure as Canvas

    labels = list(panel.values)
    canvas = Canvas(figsize=(_WIDTH, 0.75 + _ROW_HEIGHT * len(labels)), layout="constrained")
    axes = canvas.subplots()
    _style(axes, panel.title, labels, named=True)
    axes.grid(visible=False)
    _target(axes, panel.target)
    for position, label in enumerate(labels):
        found = _finite(panel.values[label])
        if not found:
            continue
        middle = statistics.fmean(found)
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        axes.barh(position, middle, height=0.56, color=_GREY if label in muted else _BLUE, linewidth=0)
        if spread:
            axes.plot([max(middle - spread, 0.0), middle + spread], [position] * 2, color=_TEXT, linewidth=1.1)
        text = f"{middle:.2g}" if middle < 100 else f"{middle:.0f}"
        place: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (middle + spread, position), fontsize=8.5, color=_TEXT, **place)
    axes.set_xlim(left=0.0)
    axes.margins(x=0.12)
    return Figure(title, _svg(canvas, title), caption, _described([panel]))
