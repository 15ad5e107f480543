r"""One step of an optimizer as a map :math:`(w, s, g) \mapsto (w', s')` of flat vectors, and its derivative.

For following a recorded training along another gradient, exactly (`step`) or to first order (`tangent`). The state
:math:`s` is the optimizer's moments and the number of steps it has made.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import expected

__all__ = ["AdamMap", "MapState", "Moments", "OptimizerMap", "SGDMap", "Setting"]

Setting: TypeAlias = float | Tensor
"""A number, or one for each entry where parameter groups differ."""

Moments: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class MapState:
    """State of an optimizer.

    Attributes:
        count: Steps it has made.
        moments: Its running averages, flat.
    """

    count: int
    moments: Moments


class OptimizerMap(ABC):
    """One step with the settings of that step."""

    n_moments: ClassVar[int]

    def begin(self, like: Tensor) -> MapState:
        """The state before the first step."""
        return MapState(0, tuple(torch.zeros_like(like) for _ in range(self.n_moments)))

    @abstractmethod
    def step(self, weights: Tensor, state: MapState, gradient: Tensor) -> tuple[Tensor, MapState]:
        """Weights and state after a step with this gradient of the loss."""

    @abstractmethod
    def tangent(
        self,
        weights: Tensor,
        state: MapState,
        gradient: Tensor,
        d_weights: Tensor,
        d_moments: Moments,
        d_gradient: Tensor,
    ) -> tuple[Tensor, Moments]:
        """The derivative of `step` at the first three arguments, along the last three."""


@dataclass(frozen=True, slots=True)
class SGDMap(OptimizerMap):
    """`torch.optim.SGD`; linear, so `tangent` is exact for any change.

    >>> SGDMap(lr=0.1).step(torch.tensor([1.0]), MapState(0, (torch.zeros(1),)), torch.tensor([2.0]))[0]
    tensor([0.8000])
    """

    lr: Setting
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: Setting = 0.0
    nesterov: bool = False
    maximize: bool = False

    n_moments: ClassVar[int] = 1

    def step(self, weights: Tensor, state: MapState, gradient: Tensor) -> tuple[Tensor, MapState]:
        """See the base."""
        weights, moments = self._linear(state, gradient, weights, state.moments)
        return weights, MapState(state.count + 1, moments)

    def tangent(
        self,
        weights: Tensor,
        state: MapState,
        gradient: Tensor,
        d_weights: Tensor,
        d_moments: Moments,
        d_gradient: Tensor,
    ) -> tuple[Tensor, Moments]:
        """See the base."""
        return self._linear(state, d_gradient, d_weights, d_moments)

    def gradient_of(self, weights: Tensor, state: MapState, change: Tensor) -> Tensor:
        """The gradient of the loss with which a step changed the weights by `change`.

        Raises:
            ValueError: the change does not tell, for a learning rate of zero or a dampening of one.
        """
        if not bool((torch.as_tensor(self.lr) != 0).all()) or (state.count and self.momentum and self.dampening == 1):
            rule = "one from which a step's gradient can be told"
            raise ValueError(expected("settings", rule, f"lr={self.lr}, dampening={self.dampening}"))
        moved, fresh = -change / self.lr, not state.count
        (before,) = state.moments
        share = 1.0 if fresh else 1.0 - self.dampening
        kept = 0.0 if fresh else self.momentum
        if not self.momentum:
            direction = moved
        elif self.nesterov:
            direction = (moved - self.momentum * kept * before) / (1.0 + self.momentum * share)
        else:
            direction = (moved - kept * before) / share
        direction = direction - self.weight_decay * weights
        return -direction if self.maximize else direction

    def _linear(self, state: MapState, gradient: Tensor, weights: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        direction = (-gradient if self.maximize else gradient) + self.weight_decay * weights
        buffer = direction  # torch begins the buffer with the first gradient, undampened
        if self.momentum and state.count:
            buffer = self.momentum * moments[0] + (1.0 - self.dampening) * direction
        if self.momentum:
            direction = direction + self.momentum * buffer if self.nesterov else buffer
        return weights - self.lr * direction, (buffer,)


@dataclass(frozen=True, slots=True)
class AdamMap(OptimizerMap):
    r"""`torch.optim.Adam` and, `decoupled`, `AdamW`; without `amsgrad`.

    The derivative of :math:`\sqrt v` does not exist at 0, which is where an entry has never had a gradient; the
    derivative of that entry's update is taken as 0 there. Just above 0 it exists and is as long as `1 / eps`.
    """

    lr: Setting
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: Setting = 0.0
    decoupled: bool = False
    maximize: bool = False

    n_moments: ClassVar[int] = 2

    def step(self, weights: Tensor, state: MapState, gradient: Tensor) -> tuple[Tensor, MapState]:
        """See the base."""
        count = state.count + 1
        mean, square, _ = self._averages(weights, state.moments, gradient)
        root = square.sqrt() / math.sqrt(1.0 - self.beta2**count)
        update = mean / (root + self.eps) / (1.0 - self.beta1**count)
        return self._decayed(weights) - self.lr * update, MapState(count, (mean, square))

    def tangent(
        self,
        weights: Tensor,
        state: MapState,
        gradient: Tensor,
        d_weights: Tensor,
        d_moments: Moments,
        d_gradient: Tensor,
    ) -> tuple[Tensor, Moments]:
        """See the base."""
        count = state.count + 1
        mean, square, slope = self._averages(weights, state.moments, gradient)
        d_slope = self._slope(d_weights, d_gradient)
        d_mean = self.beta1 * d_moments[0] + (1.0 - self.beta1) * d_slope
        d_square = self.beta2 * d_moments[1] + 2.0 * (1.0 - self.beta2) * slope * d_slope
        correction = math.sqrt(1.0 - self.beta2**count)
        root = square.sqrt() / correction
        seen = root > 0
        safe = torch.where(seen, root, 1.0)
        d_root = d_square / (2.0 * correction**2 * safe)
        below = root + self.eps
        d_update = (d_mean / below - mean * d_root / below.square()) / (1.0 - self.beta1**count)
        d_update = torch.where(seen, d_update, 0.0)
        return self._decayed(d_weights) - self.lr * d_update, (d_mean, d_square)

    def _slope(self, weights: Tensor, gradient: Tensor) -> Tensor:
        slope = -gradient if self.maximize else gradient
        return slope if self.decoupled else slope + self.weight_decay * weights

    def _averages(self, weights: Tensor, moments: Moments, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope = self._slope(weights, gradient)
        mean = self.beta1 * moments[0] + (1.0 - self.beta1) * slope
        square = self.beta2 * moments[1] + (1.0 - self.beta2) * slope.square()
        return mean, square, slope

    def _decayed(self, weights: Tensor) -> Tensor:
        return weights * (1.0 - self.lr * self.weight_decay) if self.decoupled else weights
