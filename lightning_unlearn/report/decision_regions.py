"""Pictures of decision regions: what several models answer in a plane through a forgotten sample and two others.

What unlearning does to a model can be looked at. Alon and Dar 2025 (arXiv 2503.08633) find that wide networks change
their decision regions near the forgotten samples, and little elsewhere; planes through three samples are those of
Somepalli et al. 2022 (arXiv 2203.08124). One plane is an example and no measurement:
:class:`~lightning_unlearn.metrics.DecisionRegionChange` counts over many of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_unlearn.functional.decision_regions import labels_changed, plane_grid
from lightning_unlearn.report.region_drawing import draw_regions
from lightning_unlearn.utilities.batch_adapter import BatchAdapter
from lightning_unlearn.utilities.checks import check_positive_int, expected
from lightning_unlearn.utilities.modes import evaluating, isolated_rng, preserved_buffers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DecisionPlane", "decision_plane", "draw_decision_plane", "plot_decision_regions"]


@dataclass(frozen=True, slots=True)
class DecisionPlane:
    """What models answer on one grid of points; everything is on the CPU. R is the resolution, C the classes.

    Attributes:
        coordinates: Of the points, float64 (R, R, 2), in units of the input space: along the first index from the
            anchor to the second sample, along the second index at right angles to it towards the third.
        samples: Coordinates of the three samples, float64 (3, 2); the anchor is the origin.
        classes: Model's name -> class answered at every point, int64 (R, R).
        confidences: Model's name -> probability of that class, float32 (R, R).
        answers: Model's name -> class answered at the three samples themselves.
        changed: Model's name -> share of the points where it answers another class than the first model.
        n_classes: C.
    """

    coordinates: Tensor
    samples: Tensor
    classes: Mapping[str, Tensor]
    confidences: Mapping[str, Tensor]
    answers: Mapping[str, tuple[int, int, int]]
    changed: Mapping[str, float]
    n_classes: int


def _probabilities(model: nn.Module, points: Tensor, batch_size: int, adapter: BatchAdapter) -> Tensor:
    """Probabilities (N, C) on the CPU; the model is as it was afterwards, and so are the random generators."""
    held = next(chain(model.parameters(), model.buffers()), None)
    device = points.device if held is None else held.device
    batches = (points[start : start + batch_size] for start in range(0, len(points), batch_size))
    with evaluating(model), preserved_buffers(model), isolated_rng(), torch.no_grad():
        parts = [adapter.logits(model, batch.to(device)).float().softmax(dim=1).cpu() for batch in batches]
    return torch.cat(parts)


def decision_plane(
    models: Mapping[str, nn.Module],
    anchor: Tensor,
    second: Tensor,
    third: Tensor,
    *,
    resolution: int = 100,
    margin: float = 0.1,
    batch_size: int = 500,
    adapter: BatchAdapter | None = None,
) -> DecisionPlane:
    """Ask models for their answers on a grid in the plane through three samples.

    Models run in eval mode, where they are and without gradients; modes, buffers and random generators are left as
    they were.

    Args:
        models: Name -> module. The first is what the others are compared with: the original, say, before the
            unlearned and the retrained one.
        anchor: The sample of interest, such as a forgotten one: one input without a batch dimension, any floating
            dtype that the models take.
        second: Another, same shape.
        third: Another, not on the straight line through the two.
        resolution: Points along each axis, at least 2.
        margin: How far the rectangle around the samples is extended on every side, as a share of its length there.
        batch_size: Points that a model is given at once.
        adapter: Overrides `logits(module, inputs)` where a module does not answer a batch of inputs with logits, or
            log-probabilities, of shape (N, C).

    Returns:
        The answers.

    Raises:
        ValueError: there is no model, the samples do not span a plane, a model's answer is not of shape (N, C), of as
            many classes as the first one's and finite, or a number is out of range.
        MissingRequirementError: a model's answer holds no logits.

    Source: planes as in Somepalli et al. 2022, arXiv 2203.08124 (see
    :func:`~lightning_unlearn.functional.decision_regions.plane_grid`); the purpose is that of Alon and Dar 2025,
    arXiv 2503.08633, whose own procedure is not known here.

    >>> class Threshold(nn.Module):
    ...     def __init__(self, place):
    ...         super().__init__()
    ...         self.place = place
    ...
    ...     def forward(self, x):  # class 1 to the right of the place
    ...         return torch.stack([self.place - x[:, 0], x[:, 0] - self.place], dim=1)
    >>> corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> models = {"original": Threshold(0.3), "unlearned": Threshold(0.7)}
    >>> plane = decision_plane(models, *corners, resolution=5, margin=0.0)
    >>> plane.classes["original"].tolist()[1:3], plane.answers["original"], plane.changed
    ([[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], (0, 1, 0), {'original': 0.0, 'unlearned': 0.2})
    """
    if not models:
        raise ValueError(expected("models", "at least one", "none"))
    check_positive_int("batch_size", batch_size)
    adapter = adapter or BatchAdapter()
    first, other, last = (sample.detach() for sample in (anchor, second, third))
    points, coordinates = plane_grid(first, other, last, resolution=resolution, margin=margin)
    corners = torch.stack([first, other, last])
    classes: dict[str, Tensor] = {}
    confidences: dict[str, Tensor] = {}
    answers: dict[str, tuple[int, int, int]] = {}
    n_classes = 0
    for name, model in models.items():
        probabilities = _probabilities(model, torch.cat([corners, points]), batch_size, adapter)
        if probabilities.ndim != 2 or (classes and probabilities.shape[1] != n_classes):
            rule = f"logits of shape (N, {n_classes or 'C'})"
            raise ValueError(expected(f"answer of {name!r}", rule, tuple(probabilities.shape)))
        if bool(probabilities.isnan().any()):
            raise ValueError(expected(f"answer of {name!r}", "finite", "NaN", "Leave a model out that diverged."))
        n_classes = probabilities.shape[1]
        confidence, answered = probabilities.max(dim=1)
        a, b, c = answered[:3].tolist()
        answers[name] = (a, b, c)
        classes[name] = answered[3:].reshape(resolution, resolution)
        confidences[name] = confidence[3:].reshape(resolution, resolution)
    before = next(iter(classes.values())).flatten()
    changed = {name: float(labels_changed(before, one.flatten()).double().mean()) for name, one in classes.items()}
    grid = coordinates.cpu().reshape(resolution, resolution, 2)
    return DecisionPlane(grid, _places(corners), classes, confidences, answers, changed, n_classes)


def _places(corners: Tensor) -> Tensor:
    """Coordinates of three samples in their own plane, float64 (3, 2)."""
    origin, along, other = corners.double().flatten(1).cpu()
    along, other = along - origin, other - origin
    length = along.norm()
    shift = other @ along / length
    height = (other - shift * along / length).norm()
    return torch.stack([torch.zeros(2).double(), torch.stack([length, length * 0]), torch.stack([shift, height])])


def draw_decision_plane(
    plane: DecisionPlane,
    *,
    class_names: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    title: str = "What each model answers around a forgotten sample",
) -> Figure:
    """Draw what :func:`decision_plane` found: a panel for each model.

    A point's colour is the class that is answered there, the same in all panels, and paler where the model is less
    sure. The forgotten sample is a star, the two others are dots. Above each panel stand the sample's label and the
    model's answer, below it the share of the plane that changed against the first model. Distances are those of the
    input space, unless the three samples lie nearly on a line: then the picture is stretched across it.

    Args:
        plane: The answers.
        class_names: Name of each class, by number; the numbers themselves by default.
        labels: Class numbers that the anchor, the second and the third sample have in the data.
        title: Heading of the figure.

    Returns:
        A figure of its own, which pyplot does not know: `figure.savefig("regions.png")` writes it, and a notebook
        shows it.

    Raises:
        ValueError: there are too few names, or `labels` are not three class numbers.

    >>> classes, sure = torch.tensor([[0, 0], [1, 1]]), torch.full((2, 2), 0.9)
    >>> grid = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0)).double().reshape(2, 2, 2)
    >>> corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    >>> plane = DecisionPlane(grid, corners, {"original": classes}, {"original": sure}, {"original": (0, 1, 0)}, {}, 2)
    >>> figure = draw_decision_plane(plane, class_names=["cat", "dog"], labels=[0, 1, 0])
    >>> print(figure.axes[0].get_title())
    original
    labelled cat, answers cat
    """
    names = [str(number) for number in range(plane.n_classes)] if class_names is None else list(class_names)
    if len(names) < plane.n_classes:
        raise ValueError(expected("class_names", f"{plane.n_classes} names", len(names)))
    if labels is not None and (len(labels) != 3 or not all(0 <= label < len(names) for label in labels)):
        raise ValueError(expected("labels", f"three class numbers from 0 to {len(names) - 1}", list(labels)))
    panels = {}
    for position, (model, answers) in enumerate(plane.answers.items()):
        answered = f"answers {names[answers[0]]}"
        heading = answered if labels is None else f"labelled {names[labels[0]]}, {answered}"
        share = (
            f"{plane.changed[model]:.0%} of the area changed" if position else "before: the others are compared with it"
        )
        panels[model] = (heading, share)
    known = None if labels is None else [names[label] for label in labels]
    return draw_regions(plane.coordinates, plane.samples, plane.classes, plane.confidences, panels, names, known, title)


def plot_decision_regions(
    models: Mapping[str, nn.Module],
    anchor: Tensor,
    second: Tensor,
    third: Tensor,
    *,
    class_names: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    title: str = "What each model answers around a forgotten sample",
    resolution: int = 100,
    margin: float = 0.1,
    batch_size: int = 500,
    adapter: BatchAdapter | None = None,
) -> Figure:
    """Draw the decision regions of several models in the plane through a forgotten sample and two others.

    :func:`decision_plane` asks the models, :func:`draw_decision_plane` draws; see there for what is shown, for the
    arguments, and for what is raised.

    Args:
        models: Name -> module: `{"original": ..., "unlearned": ..., "retrained": ...}`.
        anchor: The forgotten sample, without a batch dimension.
        second: Another sample, such as one of the data to keep.
        third: Another, not on the straight line through the two.
        class_names: Name of each class, by number.
        labels: Class numbers that the three samples have in the data.
        title: Heading of the figure.
        resolution: Points along each axis.
        margin: How far the rectangle around the samples is extended, as a share of its length.
        batch_size: Points that a model is given at once.
        adapter: Overrides `logits(module, inputs)` for modules that answer in another way.

    Returns:
        A figure of its own, which pyplot does not know.

    Source: Alon and Dar 2025, arXiv 2503.08633, for the purpose; planes as in Somepalli et al. 2022, arXiv 2203.08124.

    >>> models = {"original": nn.Linear(2, 3), "unlearned": nn.Linear(2, 3)}
    >>> figure = plot_decision_regions(models, *torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), resolution=20)
    >>> len(figure.axes)
    2
    """
    plane = decision_plane(
        models, anchor, second, third, resolution=resolution, margin=margin, batch_size=batch_size, adapter=adapter
    )
    return draw_decision_plane(plane, class_names=class_names, labels=labels, title=title)
