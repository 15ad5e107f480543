"""One step of a recorded training: what the optimizer did, and what it must have had for a gradient."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.functional.optimizer_maps import MapState, OptimizerMap, SGDMap
from lightning_unlearn.utilities.checks import expected

__all__ = ["ROUNDING", "Point"]

ROUNDING = 1e-6
"""Of the weights' length: what a difference of two float32 weights does not know."""


class Point:
    """One recorded step.

    Attributes:
        step: Its ordinal.
        rule: What the optimizer did in it.
        weights: Flat, float64, before it.
        state: The optimizer's state before it.
        change: What was recorded of it, flat; `None` where it is computed.
        batch: Positions of the samples of its batch.
        kept: Those that are not forgotten.
        given: The gradient of the recorded batch as computed anew, where somebody has.

    Args:
        compute: Gradient at some weights of some samples as one batch.
    """

    def __init__(
        self,
        step: int,
        rule: OptimizerMap,
        weights: Tensor,
        state: MapState,
        change: Tensor | None,
        *,
        batch: Sequence[int],
        forgotten: Container[int],
        compute: Callable[[Tensor, Sequence[int]], Tensor],
    ) -> None:
        self.step = step
        self.rule = rule
        self.weights = weights
        self.state = state
        self.change = change
        self.batch = batch
        self.kept = [one for one in batch if one not in forgotten]
        self.given: Tensor | None = None
        self._compute = compute

    @cached_property
    def gradient(self) -> Tensor:
        """Gradient of the loss on the recorded batch; read off the recorded change where that tells it."""
        if self.read_off is not None:
            return self.read_off
        return self._compute(self.weights, self.batch) if self.given is None else self.given

    @cached_property
    def read_off(self) -> Tensor | None:
        """The gradient that the recorded change tells, `None` where it tells none."""
        if self.change is None or not isinstance(self.rule, SGDMap):
            return None
        if not bool((torch.as_tensor(self.rule.lr) != 0).all()):
            return None
        return self.rule.gradient_of(self.weights, self.state, self.change)

    @cached_property
    def after(self) -> tuple[Tensor, MapState]:
        """Weights and state after the step: the recorded change, or else that of the optimizer."""
        weights, state = self.rule.step(self.weights, self.state, self.gradient)
        return (weights if self.change is None else self.weights + self.change), state

    def check(self, tolerance: float | None) -> None:
        """Check that the recorded change is that of the optimizer with the gradient of the batch.

        Raises:
            StoreMismatchError: it differs by more than `tolerance` of its length, beyond rounding.
        """
        if tolerance is None or self.change is None:
            return
        computed = self._compute(self.weights, self.batch) if self.given is None else self.given
        error = self.rule.step(self.weights, self.state, computed)[0] - self.weights - self.change
        length, rounding = float(self.change.norm()), ROUNDING * float(self.weights.norm())
        if not float(error.norm()) <= tolerance * length + rounding:
            rule = f"the change of its optimizer with the gradient of its batch in step {self.step}"
            got = f"another by {float(error.norm()) / max(length, 1e-300):.1%}"
            remedy = (
                "Clipped gradients, dropout, random augmentation, accumulation and rates outside the module's own "
                "schedule cannot be followed; `lr=` gives rates, `tolerance=None` follows all the same."
            )
            raise StoreMismatchError(expected("store", rule, got, remedy))
