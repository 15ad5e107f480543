r"""How a change of the gradients of a training grows into a change of its weights, to first order, step by step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_unlearn.functional.optimizer_maps import MapState, OptimizerMap

__all__ = ["UnrolledChange"]


class UnrolledChange:
    r"""Carries :math:`(\delta, \sigma)`, the change of weights and optimizer state, along a known training.

    :math:`(\delta', \sigma') = \partial U(\delta, \sigma, \gamma)` with the optimizer's map :math:`U` at the known
    weights, state and gradient, and the change :math:`\gamma` of the gradient, which is the caller's. A step that the
    changed training does not make leaves its weights and state where they are. It then has made fewer steps, which
    bias corrections depend on; that difference is taken in full.

    Args:
        n_parameters: Length of the flat weights.
        n_moments: How many moments the optimizer has.
        device: Where to keep them.

    >>> from lightning_unlearn.functional.optimizer_maps import SGDMap
    >>> rule, change = SGDMap(lr=0.5), UnrolledChange(1, 1)
    >>> change.advance(rule, torch.ones(1), rule.begin(torch.ones(1)), torch.ones(1), torch.tensor([0.2]))
    >>> change.weights
    tensor([-0.1000], dtype=torch.float64)
    """

    def __init__(self, n_parameters: int, n_moments: int, device: torch.device | str = "cpu") -> None:
        def zeros() -> Tensor:
            return torch.zeros(n_parameters, dtype=torch.float64, device=device)

        self.weights = zeros()
        self.moments = tuple(zeros() for _ in range(n_moments))
        self._skipped = 0

    @property
    def is_zero(self) -> bool:
        """Whether nothing has changed so far."""
        return not self._skipped and not any(bool(one.any()) for one in (self.weights, *self.moments))

    @property
    def is_finite(self) -> bool:
        """Whether every entry is a number."""
        return all(bool(torch.isfinite(one).all()) for one in (self.weights, *self.moments))

    def advance(
        self, rule: OptimizerMap, weights: Tensor, state: MapState, gradient: Tensor, d_gradient: Tensor
    ) -> None:
        """A step that both trainings make.

        Args:
            rule: The optimizer's map in this step.
            weights: Known weights before it.
            state: Known state before it.
            gradient: Known gradient of the loss.
            d_gradient: What is added to the gradient in the changed training.
        """
        made = replace(state, count=state.count - self._skipped)
        d_weights, d_moments = rule.tangent(weights, made, gradient, self.weights, self.moments, d_gradient)
        if self._skipped:
            here, there = rule.step(weights, state, gradient), rule.step(weights, made, gradient)
            d_weights = d_weights + there[0] - here[0]
            d_moments = tuple(
                one + after - before
                for one, after, before in zip(d_moments, there[1].moments, here[1].moments, strict=True)
            )
        self.weights, self.moments = d_weights, d_moments

    def skip(self, moved: Tensor, before: MapState, after: MapState) -> None:
        """A step that only the known training makes, moving its weights by `moved`."""
        self.weights = self.weights - moved
        self.moments = tuple(
            one + old - new for one, old, new in zip(self.moments, before.moments, after.moments, strict=True)
        )
        self._skipped += 1
