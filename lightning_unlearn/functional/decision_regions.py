"""Where the answers of a model changed: points near and far from the forgotten samples, and the share that changed.

Alon and Dar 2025 (arXiv 2503.08633) find that wide networks unlearn by changing their decision regions near the
forgotten samples, and little elsewhere. How the paper chooses its points is not known here, so it is a parameter:
:class:`PlaneSampling` draws planes through three samples as Somepalli et al. 2022 (arXiv 2203.08124) do, and
:class:`BallSampling` draws points around a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_unlearn.functional.predictions import predicted_classes
from lightning_unlearn.utilities.checks import check_positive, check_positive_int, expected

__all__ = ["BallSampling", "PlaneSampling", "RegionSampling", "labels_changed", "plane_grid", "region_points"]


def labels_changed(before: Tensor, after: Tensor) -> Tensor:
    """Whether each point is given another class; the mean is the share of the region that changed.

    One minus that mean is the agreement of two models in the code of Somepalli et al. 2022 (arXiv 2203.08124).

    Args:
        before: Outputs of one model: logits or probabilities (N, C), or class numbers (N,).
        after: Outputs of the other for the same points, in either form.

    Returns:
        bool of shape (N,).

    Raises:
        ValueError: they are not outputs for the same number of points.

    >>> labels_changed(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2]))
    tensor([False,  True, False])
    """
    old, new = predicted_classes(before, "before"), predicted_classes(after, "after")
    if old.shape != new.shape:
        raise ValueError(expected("after", f"outputs for {len(old)} points", len(new)))
    return old != new.to(old.device)


def plane_grid(
    first: Tensor, second: Tensor, third: Tensor, *, resolution: int, margin: float = 0.1, radius: float | None = None
) -> tuple[Tensor, Tensor]:
    """Points on a regular grid in the plane through three samples.

    The first axis runs from the first sample to the second, the second axis at right angles to it towards the third
    (Gram-Schmidt), with the first sample as the origin. Without `radius` the grid covers the rectangle around the
    three, as in the code of Somepalli et al. 2022 (arXiv 2203.08124). Their resolution is 500, their margin 0.1.

    Args:
        first: A sample of any shape and floating dtype.
        second: Another, same shape.
        third: Another, not on the straight line through the two.
        resolution: Points along each axis, at least 2.
        margin: How far the rectangle is extended on every side, as a share of its length there.
        radius: Cover the disc of this radius (L2, in input space) around the first sample instead: those points of a
            grid over the square around the disc that lie within it. It needs a resolution of at least 3.

    Returns:
        Points (M, *shape) in the samples' dtype, and their float64 coordinates (M, 2) in units of the input space;
        M is the square of `resolution`, or less with `radius`.

    Raises:
        ValueError: the samples do not span a plane, differ in shape or are no floating tensors, or a number is out of
            range.

    >>> corners = torch.eye(3)[0] * 0, torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    >>> plane_grid(*corners, resolution=2, margin=0.0)[0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [2.0, 0.0, 0.0], [2.0, 0.0, 1.0]]
    """
    check_positive_int("resolution", resolution)
    check_positive("margin", margin, zero=True)
    least = 2 if radius is None else 3
    if resolution < least:
        raise ValueError(expected("resolution", f"at least {least}", resolution))
    if not first.is_floating_point() or not first.shape == second.shape == third.shape:
        got = [(tuple(sample.shape), sample.dtype) for sample in (first, second, third)]
        raise ValueError(expected("samples", "three floating tensors of one shape", got))
    origin = first.double().flatten()
    along, other = second.double().flatten() - origin, third.double().flatten() - origin
    length, reach = along.norm(), other.norm()
    along = along / length
    shift = other @ along
    across = other - shift * along
    height = across.norm()
    # Rounding leaves something of a third sample on the line; without the factor it would become an axis.
    if not length > 0 or not height > 1e-12 * reach:
        raise ValueError(expected("samples", "three that span a plane", "samples on one line", "Choose others."))
    axes = torch.stack([along, across / height])
    if radius is None:
        ranges = [(min(0.0, float(shift)), max(float(length), float(shift))), (0.0, float(height))]
        ranges = [(low - margin * (high - low), high + margin * (high - low)) for low, high in ranges]
    else:
        ranges = [(-check_positive("radius", radius), radius)] * 2
    ticks = [torch.linspace(*bounds, resolution, dtype=torch.float64, device=first.device) for bounds in ranges]
    coordinates = torch.cartesian_prod(*ticks)
    if radius is not None:
        coordinates = coordinates[coordinates.norm(dim=1) <= radius]
    return (origin + coordinates @ axes).to(first.dtype).reshape(-1, *first.shape), coordinates


class RegionSampling(Protocol):
    """How points are chosen that belong to one sample."""

    def __call__(self, anchor: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
        """Points (M, *shape) for the sample `anchor`, (*shape), by means of `others`, (K, *shape)."""
        ...


@dataclass(frozen=True, slots=True)
class PlaneSampling:
    """Grids in planes through a sample and two others, drawn at random; see :func:`plane_grid`.

    Attributes:
        planes: Planes for each sample.
        resolution: Points along each axis of a plane.
        margin: How far the rectangle around the three samples is extended, as a share of its length.
        radius: Only the disc of this radius around the sample, instead of the rectangle.

    >>> sampling = PlaneSampling(planes=2, resolution=3)
    >>> sampling(torch.zeros(4), torch.eye(4), torch.Generator().manual_seed(0)).shape
    torch.Size([18, 4])
    """

    planes: int = 1
    resolution: int = 20
    margin: float = 0.1
    radius: float | None = None

    def __call__(self, anchor: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
        """Points (M, *shape) of all planes of one sample.

        Raises:
            ValueError: there are no two different samples beside this one, or the three do not span a plane.
        """
        points = []
        for _ in range(check_positive_int("planes", self.planes)):
            corners = [anchor]
            for index in torch.randperm(len(others), generator=generator).tolist():
                # A sample that occurs twice, or is the anchor itself, spans no plane with its like.
                if not any(torch.equal(others[index], corner) for corner in corners):
                    corners.append(others[index])
                if len(corners) == 3:
                    break
            if len(corners) < 3:
                rule = "samples of which two differ from the anchor and from each other"
                raise ValueError(expected("others", rule, f"{len(others)} samples"))
            first, second, third = corners
            grid, _ = plane_grid(
                first, second, third, resolution=self.resolution, margin=self.margin, radius=self.radius
            )
            points.append(grid)
        return torch.cat(points)


@dataclass(frozen=True, slots=True)
class BallSampling:
    """Points drawn uniformly from the L2 ball around a sample; in many dimensions nearly all lie near its surface.

    Attributes:
        radius: Radius of the ball in input space.
        points: Points for each sample.

    >>> points = BallSampling(radius=2.0, points=50)(torch.ones(3), torch.empty(0, 3), torch.Generator())
    >>> points.shape, bool((points - 1).norm(dim=1).max() <= 2)
    (torch.Size([50, 3]), True)
    """

    radius: float
    points: int = 100

    def __call__(self, anchor: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
        """Points (M, *shape) around one sample; `others` are not used."""
        check_positive("radius", self.radius)
        count, size = check_positive_int("points", self.points), anchor.numel()
        # Drawn on the CPU, so that every device is given the same points.
        directions = torch.randn(count, size, generator=generator, dtype=torch.float64)
        lengths = torch.rand(count, 1, generator=generator, dtype=torch.float64).pow(1 / size)
        steps: Tensor = self.radius * lengths * directions / directions.norm(dim=1, keepdim=True)
        return (anchor.double() + steps.to(anchor.device).reshape(count, *anchor.shape)).to(anchor.dtype)


def region_points(
    anchors: Tensor,
    others: Tensor,
    *,
    sampling: RegionSampling,
    seed: int = 0,
    clamp: tuple[float, float] | None = None,
) -> Iterator[Tensor]:
    """Points for each of some samples, one sample at a time.

    With forgotten samples as anchors these are points near them. Points far from them come of retained or held-out
    anchors with the same sampling. Anchor number i is given the same random numbers whatever the other anchors are.

    Args:
        anchors: (N, *shape) samples, any floating dtype.
        others: (K, *shape) samples that planes are drawn through, such as held-out ones.
        sampling: :class:`PlaneSampling`, :class:`BallSampling` or any callable of the same form.
        seed: Of the random numbers; the global generators are not used.
        clamp: Smallest and largest value an input may have, for points that would leave the range. Not applied by
            default: a plane that is cut is none.

    Yields:
        Points (M, *shape) of one anchor after the other, on its device.

    >>> parts = region_points(torch.zeros(2, 3), torch.eye(3), sampling=PlaneSampling(resolution=5), clamp=(0.0, 1.0))
    >>> [tuple(part.shape) for part in parts]
    [(25, 3), (25, 3)]
    """
    for number, anchor in enumerate(anchors):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        points = sampling(anchor, others, generator)
        yield points if clamp is None else points.clamp(*clamp)
