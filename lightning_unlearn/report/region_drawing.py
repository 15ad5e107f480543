"""Drawing of decision regions: colours of classes, panels, marks and the legend."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["class_colours", "draw_regions", "region_image"]

_COLUMNS = 3
_FAINTEST = 0.3
"""How much of its colour a class keeps where the model is no surer than chance."""


def class_colours(occurring: Sequence[int]) -> dict[int, tuple[float, float, float]]:
    """A colour for each class: up to ten classes have theirs by number, so that figures of one data set agree.

    >>> class_colours([1, 4]) == {key: colour for key, colour in class_colours(range(6)).items() if key in (1, 4)}
    True
    """
    import matplotlib as mpl

    if max(occurring, default=0) < 10:
        ten = mpl.colormaps["tab10"]
        return {number: ten(number)[:3] for number in occurring}
    wheel = mpl.colormaps["hsv"]
    return {number: wheel(place / len(occurring))[:3] for place, number in enumerate(occurring)}


def region_image(
    classes: Tensor, confidences: Tensor, colours: Mapping[int, tuple[float, float, float]], n_classes: int
) -> Tensor:
    """Red, green and blue (R, R, 3) of a grid: the class's colour, mixed with white where the model is less sure.

    Args:
        classes: int64 (R, R).
        confidences: Probability of the class, (R, R).
        colours: Of every class that occurs.
        n_classes: Number of classes; one divided by it is chance.
    """
    chance = 1 / max(n_classes, 2)
    sure = ((confidences.double() - chance) / (1 - chance)).clamp(0, 1)
    weight = (_FAINTEST + (1 - _FAINTEST) * sure).unsqueeze(-1)
    image = torch.ones(*classes.shape, 3, dtype=torch.float64)
    for number, colour in colours.items():
        image[classes == number] = torch.tensor(colour, dtype=torch.float64)
    return weight * image + (1 - weight)


def draw_regions(
    coordinates: Tensor,
    samples: Tensor,
    classes: Mapping[str, Tensor],
    confidences: Mapping[str, Tensor],
    panels: Mapping[str, tuple[str, str]],
    names: Sequence[str],
    labels: Sequence[str] | None,
    title: str,
) -> Figure:
    """One panel for each model, at most three in a row.

    Args:
        coordinates: Of the grid, (R, R, 2).
        samples: Of the forgotten sample and the two others, (3, 2).
        classes: Model -> class at each point, (R, R).
        confidences: Model -> its probability, (R, R).
        panels: Model -> the line above and the line below its panel.
        names: Of the classes, by number.
        labels: Names that stand beside the three samples.
        title: Heading.
    """
    from matplotlib.figure import Figure as Canvas

    occurring = sorted({number for one in classes.values() for number in one.flatten().tolist()})
    colours = class_colours(occurring)
    columns = min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    lows, highs = coordinates.reshape(-1, 2).min(dim=0).values, coordinates.reshape(-1, 2).max(dim=0).values
    tall = min(max(float((highs - lows)[1] / (highs - lows)[0]), 0.4), 1.6)
    canvas = Canvas(figsize=(3.2 * columns + 2.0, rows * (2.9 * tall + 0.8) + 0.9))
    canvas.set_layout_engine("constrained", h_pad=0.1)
    cells = canvas.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes, (model, (above, below)) in zip(cells, panels.items(), strict=False):
        image = region_image(classes[model], confidences[model], colours, len(names))
        _panel(axes, image, lows, highs, tall)
        _marks(axes, samples, labels, float(lows[1] + highs[1]) / 2)
        axes.set_title(f"{model}\n{above}", fontsize=10, parse_math=False)
        axes.set_xlabel(below, fontsize=9, parse_math=False)
    for axes in cells[len(panels) :]:
        axes.remove()
    _legend(canvas, {names[number]: colour for number, colour in colours.items()})
    note = (
        "Each point is a blend of the three marked samples. Its colour is the class that the model answers there; the "
        "paler, the less sure the model is."
    )
    # Characters that fit beside each other at these sizes.
    canvas.suptitle(textwrap.fill(title, int(canvas.get_figwidth() * 9)), fontsize=12, parse_math=False)
    canvas.supxlabel(textwrap.fill(note, int(canvas.get_figwidth() * 14)), fontsize=8.5, color="#444444")
    return canvas


def _panel(axes: Axes, image: Tensor, lows: Tensor, highs: Tensor, tall: float) -> None:
    # Grid points are the centres of pixels, so the picture reaches half a pixel beyond them.
    half = (highs - lows) / (image.shape[0] - 1) / 2
    (left, bottom), (right, top) = (lows - half).tolist(), (highs + half).tolist()
    axes.imshow(
        image.transpose(0, 1).numpy(), origin="lower", extent=(left, right, bottom, top), interpolation="nearest"
    )
    axes.set(xticks=[], yticks=[], aspect="auto")
    axes.set_box_aspect(tall)


def _marks(axes: Axes, samples: Tensor, labels: Sequence[str] | None, middle: float) -> None:
    style: dict[str, Any] = {"facecolor": "white", "edgecolor": "black", "zorder": 3, "clip_on": False}
    axes.scatter(samples[1:, 0].tolist(), samples[1:, 1].tolist(), s=42, marker="o", linewidth=1.2, **style)
    axes.scatter(samples[:1, 0].tolist(), samples[:1, 1].tolist(), s=260, marker="*", linewidth=1.4, **style)
    for place, label in zip(samples.tolist(), labels or (), strict=False):
        # Towards the middle, so that no label covers what stands above or below the panel.
        up = place[1] < middle
        axes.annotate(
            label, place, xytext=(0, 10 if up else -10), textcoords="offset points", ha="center", fontsize=8,
            va="bottom" if up else "top", parse_math=False,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.2}, zorder=4,
        )  # fmt: skip


def _legend(canvas: Figure, colours: Mapping[str, tuple[float, float, float]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    mark: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "white", "markeredgecolor": "black"}
    handles: list[Any] = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
    handles.append(Line2D([], [], marker="*", markersize=13, label="forgotten sample", **mark))
    handles.append(Line2D([], [], marker="o", markersize=6.5, label="other samples", **mark))
    legend = canvas.legend(handles=handles, loc="outside right center", fontsize=9, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
