"""`VerificationError` as a torchmetrics metric."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_unlearn.functional.weight_distance import Weights, verification_error
from lightning_unlearn.results import Target

__all__ = ["VerificationError"]


class VerificationError(Metric):
    """Mean L2 distance between unlearned and retrained weights (Thudi et al. 2021, arXiv 2109.13398).

    Every update takes one pair of models, so that several seeds give their mean; one pair gives the distance itself.
    All processes of a run hold the same models: the mean over them is the value of one process.

    Definition, pairing by name and the meaning of `relative_to` are those of
    :func:`lightning_unlearn.functional.weight_distance.verification_error`. The right value is 0, but a small distance
    is no evidence of forgetting: an unrelated retraining is far away and a useless edit stays near.

    Args:
        relative_to: The weights that training started from; distances are then shares of the retrained model's travel.
        kwargs: See :class:`torchmetrics.Metric`.

    >>> metric = VerificationError()
    >>> metric.update({"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])})
    >>> metric.compute()
    tensor(5., dtype=torch.float64)
    """

    is_differentiable: bool = False
    higher_is_better: bool = False
    full_state_update: bool = False
    target: ClassVar[Target] = "retrained"

    total: Tensor
    pairs: Tensor

    def __init__(self, *, relative_to: Weights | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # In a tuple, so that a module given here is neither a submodule of the metric nor moved along with it.
        self._relative_to = (relative_to,)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, unlearned: Weights, retrained: Weights) -> None:
        """Add one pair of models, given as modules or as parameters by name."""
        self.total += verification_error(unlearned, retrained, relative_to=self._relative_to[0]).to(self.total)
        self.pairs += 1

    def compute(self) -> Tensor:
        """Mean distance over the pairs, a scalar; NaN before the first update."""
        return self.total / self.pairs

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
