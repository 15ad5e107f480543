"""Unrolled influence: the missing samples' effect on every recorded step, carried to the end of the training."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.functional.unrolling import UnrolledChange
from lightning_unlearn.methods.base import Cost, EditContext, Guarantee, Requirement, WeightEdit, hyperparameters
from lightning_unlearn.methods.recorded_optimizer import LearningRate, check_learning_rate
from lightning_unlearn.methods.recorded_point import Point
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.trajectory import Trajectory, check_length
from lightning_unlearn.types import WeightChange
from lightning_unlearn.utilities.checks import check_choice, check_positive, expected

__all__ = ["UnrolledInfluence"]


@register
@hyperparameters
class UnrolledInfluence(WeightEdit):
    r"""Carry the effect of the missing samples through every recorded step: the training without them, to first order.

    Rule: with the recorded steps :math:`(w_{t+1}, s_{t+1}) = U_t(w_t, s_t, g_t)` of the optimizer (state :math:`s`,
    gradient :math:`g`), :math:`\theta_u = w_T + \delta_T` where
    :math:`(\delta, \sigma)_{t+1} = \partial U_t \cdot (\delta_t, \sigma_t, H_t \delta_t + g_t^{kept} - g_t)`, with the
    gradient :math:`g^{kept}` of what is left of the batch and its Hessian :math:`H_t`, both at the recorded
    :math:`w_t`. A batch with nothing left is a step that is not made:
    :math:`\delta_{t+1} = \delta_t + w_t - w_{t+1}`.

    Guarantee: approximate. It is the twin of the run (`Retrain(order="recorded")`) exactly where the loss is quadratic
    and the optimizer SGD, and to first order in the change elsewhere: near for few samples, smooth losses and short
    or convex trainings. Running statistics of normalisation are not carried; `unlearn` re-estimates them.

    Cost: more than retraining: a Hessian product by a second backward pass for each step from the first touched one on,
    about three gradients (measured on small networks 1.2 to 2.3 times the time, where overhead is most of both), and
    nothing before it but a look at the deltas (SGD; under Adam, and without whole deltas, one gradient a step from the
    latest anchor on). It is worth it to learn *how* the weights depend on samples without training, not to save time:
    then retrain, or use `Rewind` or `DeltaGrad`.

    Fails: where recorded and changed training part, as with large rates or many samples, and the recursion grows
    without bound; a change longer than the training's own is refused, and a shorter one may still cost a tenth of
    the accuracy (`docs/comparison.md`). Measured on small networks it left 0.3 to 0.7 of the distance of the weights to
    the twin, and 0.02 to 0.3 of that of answers (`docs/trajectory.md`).
    Under Adam the derivative of :math:`\sqrt v` is as steep as `1 / eps` where an entry has hardly had a gradient, and
    is taken as 0 where it never had one. Dropout, random augmentation, clipping, accumulation, several optimizers and
    AMSGrad cannot be followed: they are refused, or found by comparing steps with the recorded ones (`tolerance`).

    Differs from the paper: it keeps :math:`H` of the whole batch and its denominator, which are `hessian="batch"` and
    `reduction="sum"`, and has plain SGD; momentum, Adam and left-out batches are ours, by the same rule.

    Args:
        reduction: `"mean"`: the user's own loss on what is left of a batch, so a mean has fewer terms, as in
            retraining. `"sum"` (the paper): the forgotten terms become zero and the denominator stays; for mean losses.
        hessian: `"kept"`: of what is left of a batch; exact for quadratic losses. `"batch"` (the paper): of the whole
            batch, for the derivative by the samples' weight.
        max_change: Refuse a result that is further from the model than this multiple of the way the training went from
            the first touched step on (ours): it approximates nothing any more. `None` takes any.
        lr: Learning rate of every step (a number, a sequence, a function of the step); by default that of the module's
            `configure_optimizers` and its schedule, for the store has the first one only.
        tolerance: How far a computed step may be from the recorded one, relative to its length; `None` to follow any.
            0.01 is ours: 16-bit deltas stay far below it, and whatever is refused far above.

    Source: Hara, Nitanda, Maehara 2019, arXiv 1906.08473. Its text was not at hand: what is called the paper's here is
    inferred.

    >>> UnrolledInfluence().reduction
    'mean'
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset(
        {Requirement.FORGET_DATA, Requirement.RETAIN_DATA, Requirement.INITIAL_WEIGHTS}
    )
    guarantee: ClassVar[Guarantee] = "approximate"
    cost: ClassVar[Cost] = "full training"
    source: ClassVar[str] = "Hara, Nitanda, Maehara 2019, arXiv 1906.08473"

    reduction: Literal["mean", "sum"] = "mean"
    hessian: Literal["kept", "batch"] = "kept"
    max_change: float | None = 1.0
    lr: LearningRate | None = None
    tolerance: float | None = 0.01

    def __post_init__(self) -> None:
        self.reduction = check_choice("reduction", self.reduction, ("mean", "sum"))
        self.hessian = check_choice("hessian", self.hessian, ("kept", "batch"))
        self.max_change = None if self.max_change is None else check_positive("max_change", self.max_change)
        self.lr = check_learning_rate(self.lr)
        self.tolerance = None if self.tolerance is None else check_positive("tolerance", self.tolerance)

    def compute_edit(self, context: EditContext) -> WeightChange:
        r"""The change :math:`\delta_T`.

        Raises:
            LightningUnlearnError: the change is no number any more; and what `Trajectory` raises, before any work.
        """
        trajectory = Trajectory(self.name, context, lr=self.lr, tolerance=self.tolerance, dense=False)
        end, start = trajectory.weights, None
        change = UnrolledChange(len(end), trajectory.optimizer.maps[0].n_moments, end.device)
        with trajectory.elsewhere():
            for point in trajectory.points():
                start = point.weights if start is None else start
                self._follow(trajectory, point, change)
                if not change.is_finite:
                    rule = "following a training that no sample changes without bound"
                    got = f"a change that is no number after step {point.step}"
                    raise LightningUnlearnError(expected(self.name, rule, got, "Use `Retrain` or `Rewind`."))
        if start is not None:
            check_length(self.name, change.weights, end - start, self.max_change)
        return trajectory.as_change(change.weights)

    def _follow(self, trajectory: Trajectory, point: Point, change: UnrolledChange) -> None:
        if not point.kept and self.reduction == "mean":
            after, state = point.after
            change.skip(after - point.weights, point.state, state)
            return
        whole = len(point.kept) == len(point.batch)
        factor = len(point.kept) / len(point.batch) if self.reduction == "sum" else 1.0
        curved = point.batch if self.hessian == "batch" or whole else point.kept
        bend = torch.zeros_like(point.weights)
        kept: Tensor | None = None
        if curved and bool(change.weights.any()):
            found, bend = trajectory.curved_gradient(point.weights, curved, change.weights)
            if curved is point.batch:
                point.given = found
            else:
                kept, bend = found, factor * bend
        if point.given is None:
            point.given = trajectory.gradient(point.weights, point.batch)
        if whole:
            kept = point.given
        elif kept is None:
            kept = trajectory.gradient(point.weights, point.kept) if point.kept else torch.zeros_like(bend)
        change.advance(point.rule, point.weights, point.state, point.given, bend + factor * kept - point.given)
