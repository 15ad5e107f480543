"""What metrics of whole models have in common: a mean over models, in all or by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_unlearn.functional.paired_weights import Buffers
from lightning_unlearn.metrics.agreement import AgreeingMetric
from lightning_unlearn.utilities.checks import check_choice, expected, shorten

__all__ = ["MeanOverModels"]


class MeanOverModels(AgreeingMetric):
    """Mean of a number, or of one number for each of some layers, that every update computes from models.

    The state is a sum and a count, whose sizes the constructor fixes, so processes that saw no model add up as well.

    Args:
        layers: Names of parameters to report; `None` for the number of the whole model.
        buffers: Whether floating-point buffers count as weights: `"ignore"` or `"include"`.
        kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        ValueError: `layers` is empty or names a layer twice, or `buffers` is neither.
    """

    is_differentiable: bool = False
    higher_is_better: bool = False
    full_state_update: bool = False

    total: Tensor
    pairs: Tensor

    def __init__(self, *, layers: Sequence[str] | None = None, buffers: Buffers = "ignore", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if layers is not None and (isinstance(layers, str) or not layers or len(set(layers)) < len(layers)):
            raise ValueError(expected("layers", "different names of parameters", layers))
        self.layers = None if layers is None else tuple(layers)
        self.buffer_policy = check_choice("buffers", buffers, get_args(Buffers))
        shape = () if self.layers is None else (len(self.layers),)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def add(self, found: Tensor | Mapping[str, Tensor]) -> None:
        """Add what one update computed: a scalar, or a mapping from layers where some were asked for.

        Raises:
            ValueError: a layer that was asked for is not there.
        """
        if isinstance(found, Mapping):
            asked = self.layers or ()
            unknown = [name for name in asked if name not in found]
            if unknown:
                raise ValueError(expected("layers", f"names of parameters, such as {shorten(found)}", unknown))
            found = torch.stack([found[name].to(self.total) for name in asked])
        self.total += found.to(self.total)
        self.pairs += 1

    def _no_value(self) -> Any:
        value = super()._no_value()
        return value if self.layers is None else dict.fromkeys(self.layers, value)

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Mean over the updates: a scalar, or layer -> scalar; NaN before the first update."""
        mean = self.total / self.pairs
        return mean if self.layers is None else dict(zip(self.layers, mean.unbind(), strict=True))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
