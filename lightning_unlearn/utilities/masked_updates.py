"""Keep optimizer steps away from masked entries: what momentum, Adam's state or weight decay did to them is taken back.

Masking the gradient is not enough: with a zero gradient momentum still moves a weight, and weight decay always does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["MaskedUpdate"]


class MaskedUpdate:
    """One optimizer step that may change only some entries: `begin` before it, `end` after it.

    >>> weight = Parameter(torch.zeros(3))
    >>> update = MaskedUpdate()
    >>> update.begin({weight: torch.tensor([True, False, False])})
    >>> _ = weight.data.add_(1.0)
    >>> update.end(); weight.tolist()
    [1.0, 0.0, 0.0]
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Parameter, Tensor, Tensor]] = []

    @torch.no_grad()
    def begin(self, masks: Mapping[Parameter, Tensor]) -> None:
        """Take note of the weights that must not change.

        Args:
            masks: Parameter -> bool of its shape, `True` where the step may change it; others are not restricted.
        """
        self._kept = [(parameter, mask, parameter.detach().clone()) for parameter, mask in masks.items()]

    @torch.no_grad()
    def end(self) -> None:
        """Put back what must not change, bit for bit."""
        for parameter, mask, before in self._kept:
            parameter.copy_(torch.where(mask, parameter, before))
        self._kept = []
