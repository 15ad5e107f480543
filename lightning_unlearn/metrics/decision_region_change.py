"""`DecisionRegionChange`: how much of the input space is answered differently, near and far from what was forgotten."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_unlearn.functional.decision_regions import labels_changed
from lightning_unlearn.metrics.agreement import AgreeingMetric
from lightning_unlearn.results import Target

__all__ = ["DecisionRegionChange"]


class DecisionRegionChange(AgreeingMetric):
    """Share of points whose predicted class differs between two models, near the forgotten samples and elsewhere.

    Unlearning that is local changes much near and little far (Alon and Dar 2025, arXiv 2503.08633). How much is right
    only the change from the original to the retrained model can say: compute it on the same points. Where points come
    from is up to the caller, see :func:`lightning_unlearn.functional.decision_regions.region_points`.

    Measured (docs/metrics.md): on clean random samples of small networks it already differs from retraining by
    somewhat more than retrainings differ, for a whole class it was erratic on one of two data sets, and undecided
    on its wrong labels; small differences are no finding.

    Args:
        kwargs: See :class:`torchmetrics.Metric`.

    >>> from lightning_unlearn.functional.decision_regions import BallSampling, region_points
    >>> original, unlearned = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    >>> forgotten, held_out = torch.zeros(4, 2), torch.ones(4, 2)
    >>> metric, sampling = DecisionRegionChange(), BallSampling(radius=0.1)
    >>> for anchors, near in ((forgotten, True), (held_out, False)):
    ...     for points in region_points(anchors, held_out, sampling=sampling):
    ...         metric.update(original(points), unlearned(points), near=near)
    >>> list(metric.compute())
    ['near_change', 'far_change', 'near_to_far']
    """

    is_differentiable: bool = False
    higher_is_better: bool = True
    full_state_update: bool = False
    target: ClassVar[Target] = "retrained"

    changed: Tensor
    points: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("changed", "points"):
            self.add_state(name, torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor, *, near: bool) -> None:
        """Add what two models answer at the same points.

        Args:
            before: Of the original: logits or probabilities (N, C), or class numbers (N,).
            after: Of the unlearned (or retrained) model, in either form.
            near: Whether these points are near forgotten samples.

        Raises:
            ValueError: they are not outputs for the same number of points.
        """
        change, place = labels_changed(before, after), 0 if near else 1
        self.changed[place] += change.sum().to(self.changed)
        self.points[place] += change.numel()

    def _no_value(self) -> Any:
        return {}

    def compute(self) -> dict[str, Tensor]:
        """Share of points that changed, near and far, and the first divided by the second; float64 scalars.

        A share is NaN before the first point of its kind. The ratio is infinite where only points near changed, and NaN
        where none did.
        """
        near, far = (self.changed.double() / self.points).unbind()
        return {"near_change": near, "far_change": far, "near_to_far": near / far}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one result of `compute` or a list of them; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
