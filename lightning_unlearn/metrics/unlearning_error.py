"""`UnlearningError` as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning_unlearn.functional.paired_weights import Buffers, Weights
from lightning_unlearn.functional.unlearning_error import unlearning_error
from lightning_unlearn.metrics.weight_means import MeanOverModels
from lightning_unlearn.results import Target

__all__ = ["UnlearningError"]


class UnlearningError(MeanOverModels):
    """Mean unlearning error of training runs (Thudi et al. 2021, arXiv 2109.13398): how well they could be undone.

    Every update takes one run, so that several seeds give their mean. A proxy of the verification error and no bound;
    definition and limits are those of :func:`lightning_unlearn.functional.unlearning_error.unlearning_error`. Models
    may be sharded; every process must call `update` then.

    Args:
        relative: Divide by the distance each run travelled.
        layers: Names of parameters; `compute` then returns name -> mean error of that parameter, as a share of the
            whole model's way where `relative` is set.
        buffers: `"ignore"`, or `"include"` to count running statistics and other floating-point buffers as weights.
        kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        ValueError: `layers` is empty, names a layer twice, or, on update, one that the models do not have.

    >>> import torch
    >>> metric = UnlearningError()
    >>> end, start = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.zeros(2)}
    >>> metric.update(end, start, lr=0.5, steps=9, singular_value=2.0)
    >>> metric.compute()
    tensor(10., dtype=torch.float64)
    """

    target: ClassVar[Target] = "low"

    def __init__(
        self,
        *,
        relative: bool = False,
        layers: Sequence[str] | None = None,
        buffers: Buffers = "ignore",
        **kwargs: Any,
    ) -> None:
        super().__init__(layers=layers, buffers=buffers, **kwargs)
        self.relative = relative

    def update(self, weights: Weights, initial: Weights, *, lr: float, steps: int, singular_value: float) -> None:
        """Add one run: its weights, those it started from, learning rate, steps, and largest singular value."""
        by_layer = self.layers is not None
        run: dict[str, Any] = {"lr": lr, "steps": steps, "singular_value": singular_value, "relative": self.relative}
        self.add(unlearning_error(weights, initial, per_layer=by_layer, buffers=self.buffer_policy, **run))
