"""A recorded training, gone through again: weights, optimizer state and gradient of every step, and their checks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.data.collated import BatchMaker, batches_in_epoch
from lightning_unlearn.exceptions import (
    DeletionRequestError,
    LightningUnlearnError,
    MissingDeltaError,
    MissingRequirementError,
    StoreMismatchError,
)
from lightning_unlearn.functional.curvature import flat_gradient, gradient_and_product, unflatten
from lightning_unlearn.functional.optimizer_maps import MapState, SGDMap
from lightning_unlearn.methods.base import EditContext, Requirement
from lightning_unlearn.methods.batch_gradients import as_change
from lightning_unlearn.methods.recorded_optimizer import LearningRate, RecordedOptimizer
from lightning_unlearn.methods.recorded_point import ROUNDING, Point
from lightning_unlearn.methods.recorded_run import the_run
from lightning_unlearn.methods.replay import replayable_batches
from lightning_unlearn.types import StepStatus, WeightChange
from lightning_unlearn.utilities.batch_norm import frozen_statistics, tracking_layers
from lightning_unlearn.utilities.batches import leading_size
from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.parameters import weights_digest

__all__ = ["Trajectory", "check_length"]


def check_length(name: str, change: Tensor, training: Tensor, limit: float | None) -> None:
    """Refuse a change of the weights that is longer than a multiple of the training's own from the first touched step.

    Raises:
        LightningUnlearnError: it is.
    """
    length, travel = float(change.norm()), float(training.norm())
    if limit is not None and not length <= limit * travel:
        rule = f"a change no longer than {limit:g} times the training's own from the first touched step on for {name}"
        got = (
            f"one {length / travel if travel else float('inf'):.3g} times as long, which approximates nothing any more"
        )
        raise LightningUnlearnError(expected("recorded run", rule, got, "Use `Retrain` or `Rewind`."))


class Trajectory:
    """The recorded training that led to a module's weights, and the samples to forget in it.

    Gradients are those of the user's own `training_step` with dropout off, and with the statistics of the batch in
    normalisation layers, as in training.

    Args:
        name: Name of the method, for messages.
        context: The edit's context.
        lr: Learning rates, in the place of the configured ones.
        tolerance: How far a computed step may be from the recorded one; `None` for any.
        dense: Whether every delta must be there; else the steps between anchors are computed where it is not.

    Raises:
        MissingRequirementError: no store or data; learning rates that cannot be told.
        MissingDeltaError: steps without their delta, where they are needed.
        DeletionRequestError: no recorded step saw the samples.
        StoreMismatchError: the weights are not those of one recorded training of this module on these data.
        UnsupportedStrategyError: accumulated gradients, several processes or optimizers, or an optimizer without a
            known derivative.
    """

    def __init__(
        self, name: str, context: EditContext, *, lr: LearningRate | None, tolerance: float | None, dense: bool
    ) -> None:
        if context.data is None or context.store is None:
            missing = Requirement.RETAIN_DATA if context.data is None else Requirement.INITIAL_WEIGHTS
            raise MissingRequirementError(f"{name} needs {missing.value}.")
        self._name, self._context, self._store, self._tolerance = name, context, context.store, tolerance
        data, module, store = context.data, context.module, context.store
        self.forgotten = frozenset(int(one) for one in data.forget_positions)
        batches = replayable_batches(store, module, data)
        self.n_steps = len(batches)
        run = the_run(store, store.shortest_state_of(weights_digest(module)), self.n_steps)
        self.batches = batches
        touched = [step for step, batch in enumerate(batches) if not self.forgotten.isdisjoint(batch)]
        if not touched:
            got = f"none that saw {shorten(sorted(self.forgotten))}"
            raise DeletionRequestError(expected("sample_ids", "ids of recorded steps", got, "Check them."))
        self.first = touched[0]
        self.recorded = store.settings.is_dense and self._has_deltas()
        if dense and not self.recorded:
            steps = [step for step in range(self.n_steps) if store.statuses([step])[0] != StepStatus.STORED]
            got = f"one without those of steps {shorten(steps)}" if steps else f"one with keep={store.settings.keep}"
            remedy = "Record with `DeltaRecorder(store, keep=1.0)` and neither `watch` nor `size_budget`."
            raise MissingDeltaError(expected("store", "one with the whole delta of every step", got, remedy))
        self.optimizer = RecordedOptimizer.of(
            module, run.optimizers[0], steps=self.n_steps, steps_in_epoch=batches_in_epoch(data), lr=lr
        )
        self._parameters = list(self.optimizer.parameters.values())
        self._make = BatchMaker(data)
        self.samples = 0
        """Samples whose loss was differentiated so far, twice for a Hessian product."""

    @property
    def weights(self) -> Tensor:
        """The flat weights that the module has now."""
        return torch.cat([one.detach().flatten().double() for one in self._parameters])

    def as_change(self, flat: Tensor) -> WeightChange:
        """A flat vector by name."""
        return as_change(flat, self.optimizer.parameters)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """The module may be moved inside; it is bit for bit as it was afterwards."""
        before = [one.detach().clone() for one in self._parameters]
        try:
            yield
        finally:
            with torch.no_grad():
                for one, value in zip(self._parameters, before, strict=True):
                    one.copy_(value)

    def gradient(self, weights: Tensor, positions: Sequence[int]) -> Tensor:
        """Gradient of the loss of some samples as one batch, at some weights; flat, float64."""
        return flat_gradient(self._loss(weights, positions), self._parameters).double()

    def curved_gradient(self, weights: Tensor, positions: Sequence[int], vector: Tensor) -> tuple[Tensor, Tensor]:
        """As `gradient`, and the Hessian times a vector, by a second backward pass."""
        loss = self._loss(weights, positions)
        self.samples += len(positions)
        gradient, product = gradient_and_product(loss, self._parameters, vector.to(self._parameters[0].dtype))
        return gradient.double(), product.double()

    def points(self) -> Iterator[Point]:
        """The steps of the training that matter, in order: those from the first touched one on.

        Where deltas are recorded and tell the gradient (SGD), earlier steps cost a look at their deltas; else one
        gradient each from the latest anchor before the first touched step on.

        Raises:
            StoreMismatchError: a computed step is not the recorded one, or the end is not the module's weights.
            LightningUnlearnError: a weight is no number.
        """
        step, weights, state = self._start()
        final = self.weights
        travel = float((final - weights).norm())
        while step < self.n_steps:
            point = Point(
                step,
                self.optimizer.maps[step],
                weights,
                state,
                self._delta(step) if self.recorded else None,
                batch=self.batches[step],
                forgotten=self.forgotten,
                compute=self.gradient,
            )
            if step >= self.first:
                yield point
                if point.given is not None:
                    point.check(self._tolerance)
            elif point.read_off is None:
                point.given = self.gradient(weights, point.batch)
                point.check(self._tolerance)
            weights, state = point.after
            step += 1
            if not self.recorded and step in self._store.anchors:
                _, known, state = self._anchor(step)
                self._check_near(weights, known, travel, f"the anchor after step {step}")
                weights = known
        self._check_near(weights, final, travel, "the module's weights")

    def _loss(self, weights: Tensor, positions: Sequence[int]) -> Tensor:
        module = self._context.module
        with torch.no_grad():
            for one, value in zip(self._parameters, unflatten(weights, self._parameters), strict=True):
                one.copy_(value)
        batch: Any = self._make(positions)
        self.samples += len(positions)
        layers = tracking_layers(module)
        if not layers or leading_size(batch) == 1:  # one sample has no statistics
            found = self._context.loss(batch)
        else:
            with frozen_statistics(module, "batch"):
                for layer in layers:
                    layer.training = True
                found = self._context.loss(batch)
        if found is None:
            rule = "returning a loss for every recorded batch"
            raise LightningUnlearnError(expected("training_step", rule, None, "Use another method."))
        if not bool(torch.isfinite(found)):
            rule = "a method whose weights have a finite loss on the recorded batches"
            remedy = "They have left those of the training too far: compute more gradients, or use `Retrain`."
            raise LightningUnlearnError(expected("method", rule, f"{self._name} at {float(found)}", remedy))
        return found

    def _has_deltas(self) -> bool:
        return bool((self._store.statuses(range(self.n_steps)) == StepStatus.STORED).all())

    def _delta(self, step: int) -> Tensor:
        stored = self._store.read(step)
        parts = []
        for name, parameter in self.optimizer.parameters.items():
            flat = torch.zeros(parameter.numel(), dtype=torch.float64)
            if name in stored:
                values = stored[name].values.double()
                where = stored[name].indices
                flat = values if where is None else flat.index_put_((where.long(),), values)
            parts.append(flat.to(parameter.device))
        return torch.cat(parts)

    def _start(self) -> tuple[int, Tensor, MapState]:
        """Where to begin: at the start of the run, or at an anchor where steps before the first touched one cost."""
        reads_off = self.recorded and isinstance(self.optimizer.maps[0], SGDMap)
        earlier = [] if reads_off else self._store.anchors[: bisect_right(self._store.anchors, self.first)]
        if earlier:
            return self._anchor(earlier[-1])
        flat = self._flat(self._store.initial_weights())
        return 0, flat, self.optimizer.maps[0].begin(flat)

    def _anchor(self, step: int) -> tuple[int, Tensor, MapState]:
        anchor = self._store.read_anchor(step)
        if anchor.weights is None or not anchor.optimizers:
            raise StoreMismatchError(expected(f"anchor {step}", "one with weights and optimizers", "one without"))
        flat = self._flat(anchor.weights)
        return step, flat, self.optimizer.state_at(anchor.optimizers[0], step, flat)

    def _flat(self, weights: WeightChange) -> Tensor:
        parts = [weights[name].flatten().double().to(one.device) for name, one in self.optimizer.parameters.items()]
        return torch.cat(parts)

    def _check_near(self, found: Tensor, known: Tensor, travel: float, what: str) -> None:
        distance = float((found - known).norm())
        if self._tolerance is None and distance == distance:
            return
        if not distance <= (self._tolerance or 0.0) * travel + ROUNDING * float(known.norm()):
            rule = f"a training that leads to {what}"
            remedy = "Something other than its recorded steps moved the weights, or they cannot be computed again."
            raise StoreMismatchError(expected("store", rule, f"one that ends {distance:.3g} away", remedy))
