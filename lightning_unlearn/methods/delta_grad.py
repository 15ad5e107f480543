"""DeltaGrad: retraining along the recorded weights, with most gradients replaced by a quasi-Newton guess."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_unlearn.exceptions import LightningUnlearnError, UnsupportedStrategyError
from lightning_unlearn.functional.limited_memory import LimitedMemoryHessian
from lightning_unlearn.functional.optimizer_maps import SGDMap
from lightning_unlearn.methods.base import Cost, EditContext, Guarantee, Requirement, WeightEdit, hyperparameters
from lightning_unlearn.methods.recorded_optimizer import LearningRate, check_learning_rate
from lightning_unlearn.methods.recorded_point import Point
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.trajectory import Trajectory, check_length
from lightning_unlearn.types import WeightChange
from lightning_unlearn.utilities.checks import check_positive, check_positive_int, expected

__all__ = ["DeltaGrad"]

_ADDITIVE = 1e-3  # relative error above which a batch's gradient is not the mean of its samples'


@register
@hyperparameters
class DeltaGrad(WeightEdit):
    r"""Retrain along the recorded weights: true gradients now and then, recorded ones plus a correction in between.

    Rule: the optimizer's own steps from the recorded start, with :math:`w^u_t` in the place of :math:`w_t` and the
    gradient :math:`\frac{1}{b - k} (b\,G_t - \sum_{forgotten} \nabla \ell(w^u_t))` of a batch of b with k forgotten
    samples. :math:`G_t`, that of the whole batch, is computed in the first `burn_in` steps and every `period`-th one;
    in between it is :math:`g_t + B (w^u_t - w_t)` with the recorded gradient :math:`g_t`, read off the recorded
    change, and the L-BFGS matrix B of the last `history` computed pairs.

    Guarantee: approximate. With `period=1` it is the twin of the run (`Retrain(order="recorded")`) up to rounding. The
    paper proves an error of lower order than the change itself for strongly convex losses; for networks there is none.
    Running statistics of normalisation are not carried; `unlearn` re-estimates them.

    Cost: from the first touched step on, one gradient every `period` steps (two where the step is touched) and one of
    the forgotten samples in every touched step; reading the delta of every step; three checks. Cheaper than retraining
    where gradients are dear and the forgotten samples few. Needs all deltas, whole: recording those is not free.

    Fails: where curvature changes from batch to batch, as in networks trained with small batches: then a matrix from
    some batches says little about the next. Measured on small networks, `period=2` stayed near the twin, 5 came nearer
    to its weights and, in the longer trainings with momentum, further from its answers than doing nothing, and
    long periods can diverge (`docs/trajectory.md`). A change longer than the training's own is refused, and so is a
    loss that is no number. Steps whose newest pair shows no positive curvature are computed until one does (the
    paper's rule for losses that are not convex, as we read it), so it then costs as much as retraining. Gradients that
    are not the mean of their samples' (BatchNorm, sums, contrastive losses) are found in the first touched step;
    touched steps are computed then. Adam is refused, for its steps do not tell their gradients; so are dropout, random
    augmentation, clipping and accumulation, found by comparing the first, middle and last step that matter.

    Differs from the official code: momentum and Nesterov as the optimizer has them; `burn_in` and `period` count from
    the first touched step, before which nothing differs.

    Args:
        period: Steps from one computed gradient to the next. 2 is ours; the example of the official code has 5, which
            is enough for convex losses and was not for networks (`docs/trajectory.md`).
        burn_in: Steps that are computed at first. 20 as there.
        history: Pairs behind the matrix. 2 as there.
        max_curvature: Compute a step in which :math:`\|B \delta\|` exceeds this multiple of :math:`\|\delta\|`. The
            official code for networks has 1; `None`, no bound, because a suitable one depends on the loss.
        max_change: Refuse a result that is further from the model than this multiple of the way the training went from
            the first touched step on (ours): it approximates nothing any more. `None` takes any.
        lr: Learning rate of every step (a number, a sequence, a function of the step); by default that of the module's
            `configure_optimizers` and its schedule, for the store has the first one only.
        tolerance: How far a computed step may be from the recorded one, relative to its length; `None` for no check.
            0.01 is ours: 16-bit deltas stay far below it, and whatever is refused far above.

    Source: Wu, Dobriban, Davidson 2020, arXiv 2006.14755. Its text was not at hand: `burn_in`, `history`, the
    scale of the matrix and `max_curvature` are those of the official code; which steps are computed, and what happens
    where curvature is not positive, are inferred.

    >>> DeltaGrad(period=10).history
    2
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset(
        {Requirement.FORGET_DATA, Requirement.RETAIN_DATA, Requirement.INITIAL_WEIGHTS, Requirement.DENSE_DELTAS}
    )
    guarantee: ClassVar[Guarantee] = "approximate"
    cost: ClassVar[Cost] = "some steps"
    source: ClassVar[str] = "Wu, Dobriban, Davidson 2020, arXiv 2006.14755"

    period: int = 2
    burn_in: int = 20
    history: int = 2
    max_curvature: float | None = None
    max_change: float | None = 1.0
    lr: LearningRate | None = None
    tolerance: float | None = 0.01

    def __post_init__(self) -> None:
        self.period = check_positive_int("period", self.period)
        self.burn_in = check_positive_int("burn_in", self.burn_in, zero=True)
        self.history = check_positive_int("history", self.history)
        self.max_curvature = None if self.max_curvature is None else check_positive("max_curvature", self.max_curvature)
        self.max_change = None if self.max_change is None else check_positive("max_change", self.max_change)
        self.lr = check_learning_rate(self.lr)
        self.tolerance = None if self.tolerance is None else check_positive("tolerance", self.tolerance)

    def compute_edit(self, context: EditContext) -> WeightChange:
        """The way from the module's weights to those of the retraining.

        Raises:
            UnsupportedStrategyError: the optimizer is not SGD.
            LightningUnlearnError: the weights are no numbers any more; and what `Trajectory` raises, before any work.
        """
        trajectory = Trajectory(self.name, context, lr=self.lr, tolerance=self.tolerance, dense=True)
        if not isinstance(trajectory.optimizer.maps[0], SGDMap):
            rule, got = "SGD, whose steps tell their gradients", "another"
            raise UnsupportedStrategyError(expected("optimizer", rule, got, "Use UnrolledInfluence or Retrain."))
        with trajectory.elsewhere():
            retraining = _Retraining(self, trajectory)
            end = retraining.run()
        now = trajectory.weights
        if retraining.start is not None:
            check_length(self.name, end - now, now - retraining.start, self.max_change)
        return trajectory.as_change(end - now)


class _Retraining:
    """The state of one retraining."""

    def __init__(self, method: DeltaGrad, trajectory: Trajectory) -> None:
        self._method = method
        self._trajectory = trajectory
        self._hessian = LimitedMemoryHessian(method.history)
        self.start: Tensor | None = None
        self._trusted = False
        self._additive: bool | None = None
        last = trajectory.n_steps - 1
        self._checked = {trajectory.first, (trajectory.first + last) // 2, last}

    def run(self) -> Tensor:
        """The weights at the end."""
        weights = state = None
        for point in self._trajectory.points():
            if weights is None or state is None:
                self.start = weights = point.weights
                state = point.state
            if self._method.tolerance is not None and point.step in self._checked:
                point.check(self._method.tolerance)
            if point.kept:  # else the retraining has no such step
                gradient = self._gradient(point, weights)
                weights, state = point.rule.step(weights, state, gradient)
            if not bool(torch.isfinite(weights).all()):
                rule, got = "following a training that stays finite", f"weights that are no numbers at {point.step}"
                raise LightningUnlearnError(expected("DeltaGrad", rule, got, "Use a smaller `period`, or `Retrain`."))
        return self._trajectory.weights if weights is None else weights

    def _gradient(self, point: Point, weights: Tensor) -> Tensor:
        """The gradient of what is left of the batch, at the weights of the retraining."""
        trajectory, since = self._trajectory, point.step - self._trajectory.first
        touched = len(point.kept) < len(point.batch)
        due = since < self._method.burn_in or (since - self._method.burn_in) % self._method.period == 0
        guess = None if due or not self._trusted else self._guess(point, weights)
        if guess is None:
            return self._computed(point, weights)
        if not touched:
            return guess
        gone = self._gone(point)
        if self._additive and len(gone) < len(point.kept):
            rest = trajectory.gradient(weights, gone)
            return (len(point.batch) * guess - len(gone) * rest) / len(point.kept)
        return trajectory.gradient(weights, point.kept)

    def _guess(self, point: Point, weights: Tensor) -> Tensor | None:
        """The gradient of the whole batch from the recorded one; `None` where it is not to be trusted."""
        away = weights - point.weights
        if not bool(away.any()):
            return point.gradient
        bend = self._hessian.times(away)
        limit = self._method.max_curvature
        if limit is not None and float(bend.norm()) > limit * float(away.norm()):
            return None
        return point.gradient + bend

    def _computed(self, point: Point, weights: Tensor) -> Tensor:
        """The same by differentiation, and a pair for the matrix on the way."""
        trajectory, gone = self._trajectory, self._gone(point)
        kept = trajectory.gradient(weights, point.kept)
        whole = trajectory.gradient(weights, point.batch) if gone else kept
        if gone and self._additive is None:
            mean = len(point.kept) * kept + len(gone) * trajectory.gradient(weights, gone)
            error = float((mean / len(point.batch) - whole).norm())
            self._additive = error <= _ADDITIVE * float(whole.norm())
        away = weights - point.weights
        if bool(away.any()):
            self._trusted = self._hessian.add(away, whole - point.gradient)
        return kept

    def _gone(self, point: Point) -> list[int]:
        return [one for one in point.batch if one in self._trajectory.forgotten]
