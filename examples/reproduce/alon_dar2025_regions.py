"""Where decision regions change, and pictures of them as text that JSON can hold."""

from __future__ import annotations

from typing import Any

import torch
from alon_dar2025_data import Drawn
from alon_dar2025_settings import Preset
from studies import Row
from torch import Tensor, nn

from lightning_unlearn.functional.decision_regions import PlaneSampling, region_points
from lightning_unlearn.metrics import DecisionRegionChange
from lightning_unlearn.report import DecisionPlane

__all__ = ["Regions", "packed", "radius_of", "unpacked"]

_DIGITS = "0123456789"


def radius_of(drawn: Drawn) -> float:
    """How far "near" reaches: half the median distance from a forgotten image to the nearest other training image."""
    flat = drawn.images.flatten(1)
    distances = torch.cdist(flat[: drawn.forgotten], flat)
    distances[torch.arange(drawn.forgotten), torch.arange(drawn.forgotten)] = torch.inf
    return float(distances.min(dim=1).values.median()) / 2


class Regions:
    """Points around forgotten and around held-out images, and what the original answers there.

    A point lies in a disc around its image, in a plane through that image and two held-out ones drawn at random. Which
    points the paper looks at is not known here.

    Args:
        original: What other models are compared with.
        drawn: The data of the seed.
        preset: Numbers of images and points.
        seed: Of the planes.
    """

    def __init__(self, original: nn.Module, drawn: Drawn, preset: Preset, seed: int) -> None:
        sampling = PlaneSampling(planes=1, resolution=preset.resolution, radius=radius_of(drawn))
        held = drawn.test.tensors[0]
        anchors = {True: drawn.images[: min(preset.anchors, drawn.forgotten)], False: held[: preset.anchors]}
        others = held[preset.anchors :]
        self._points = {
            near: torch.cat(list(region_points(images, others, sampling=sampling, seed=seed)))
            for near, images in anchors.items()
        }
        self._before = {near: self._answers(original, points) for near, points in self._points.items()}

    @torch.no_grad()
    def _answers(self, model: nn.Module, points: Tensor) -> Tensor:
        model.eval()
        return torch.cat([model(part).argmax(dim=1) for part in points.split(500)])

    def change(self, model: nn.Module) -> Row:
        """Shares of the points near forgotten and near held-out images that are given another class now."""
        metric = DecisionRegionChange()
        for near, points in self._points.items():
            metric.update(self._before[near], self._answers(model, points), near=near)
        return {name: float(value) for name, value in metric.compute().items()}


def packed(plane: DecisionPlane) -> Row:
    """A plane of at most ten classes: a digit a point for the class, one for its probability in tenths."""
    classes, sure = {}, {}
    for name, one in plane.classes.items():
        classes[name] = "".join(_DIGITS[number] for number in one.flatten().tolist())
        tenths = (plane.confidences[name] * 10).long().clamp(0, 9)
        sure[name] = "".join(_DIGITS[number] for number in tenths.flatten().tolist())
    grid = plane.coordinates
    return {
        "classes": classes, "confidences": sure, "answers": {name: list(one) for name, one in plane.answers.items()},
        "changed": dict(plane.changed), "samples": plane.samples.tolist(), "n_classes": plane.n_classes,
        "corners": [grid[0, 0].tolist(), grid[-1, -1].tolist()], "resolution": len(grid),
    }  # fmt: skip


def unpacked(row: dict[str, Any]) -> DecisionPlane:
    """What `packed` made of a plane, but for the probabilities, which are the middles of tenths."""
    size = row["resolution"]
    (left, low), (right, high) = row["corners"]
    ticks = (torch.linspace(left, right, size, dtype=torch.float64), torch.linspace(low, high, size).double())

    def grid(text: str) -> Tensor:
        return torch.tensor([int(one) for one in text]).reshape(size, size)

    return DecisionPlane(
        coordinates=torch.cartesian_prod(*ticks).reshape(size, size, 2),
        samples=torch.tensor(row["samples"], dtype=torch.float64),
        classes={name: grid(text) for name, text in row["classes"].items()},
        confidences={name: grid(text) / 10 + 0.05 for name, text in row["confidences"].items()},
        answers={name: (one[0], one[1], one[2]) for name, one in row["answers"].items()},
        changed=row["changed"],
        n_classes=row["n_classes"],
    )
