"""`VerificationError` as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning_unlearn.functional.paired_weights import Buffers, Weights
from lightning_unlearn.functional.weight_distance import verification_error
from lightning_unlearn.metrics.weight_means import MeanOverModels
from lightning_unlearn.results import Target

__all__ = ["VerificationError"]


class VerificationError(MeanOverModels):
    """Mean L2 distance between unlearned and retrained weights (Thudi et al. 2021, arXiv 2109.13398).

    Every update takes one pair of models, so that several seeds give their mean; one pair gives the distance itself.
    All processes of a run hold the same models: the mean over them is the value of one process. Models may be sharded;
    every process must call `update` then, and each adds the distance of the whole models.

    Definition, pairing by name and the meaning of `relative_to` are those of
    :func:`lightning_unlearn.functional.weight_distance.verification_error`. The right value is 0, but a small distance
    is no evidence of forgetting: an unrelated retraining is far away and a useless edit stays near.

    Args:
        relative_to: The weights that training started from; distances are then shares of the retrained model's travel.
        layers: Names of parameters; `compute` then returns name -> mean distance of that parameter, as a share of the
            whole model's travel where `relative_to` is given.
        buffers: `"ignore"`, or `"include"` to count running statistics and other floating-point buffers as weights.
        kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        ValueError: `layers` is empty, names a layer twice, or, on update, one that the models do not have.

    >>> import torch
    >>> metric = VerificationError()
    >>> metric.update({"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])})
    >>> metric.compute()
    tensor(5., dtype=torch.float64)
    """

    target: ClassVar[Target] = "retrained"

    def __init__(
        self,
        *,
        relative_to: Weights | None = None,
        layers: Sequence[str] | None = None,
        buffers: Buffers = "ignore",
        **kwargs: Any,
    ) -> None:
        super().__init__(layers=layers, buffers=buffers, **kwargs)
        # In a tuple, so that a module given here is neither a submodule of the metric nor moved along with it.
        self._relative_to = (relative_to,)

    def update(self, unlearned: Weights, retrained: Weights) -> None:
        """Add one pair of models, given as modules or as parameters by name."""
        start, by_layer = self._relative_to[0], self.layers is not None
        self.add(
            verification_error(unlearned, retrained, relative_to=start, per_layer=by_layer, buffers=self.buffer_policy)
        )
