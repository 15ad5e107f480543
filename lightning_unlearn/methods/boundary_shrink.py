"""Boundary Shrink: teach the data to forget the class on the other side of the nearest decision boundary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from lightning import LightningModule
from torch import Tensor

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.functional.adversarial import gradient_sign_step
from lightning_unlearn.methods.base import Guarantee, Requirement, hyperparameters
from lightning_unlearn.methods.loss_method import PushingMethod, UnlearningHost, as_loss
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import Choices, FloatRange, IntRange, SearchSpace
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.checks import check_positive, check_positive_int, expected

__all__ = ["BoundaryShrink"]


@register
@hyperparameters
class BoundaryShrink(PushingMethod):
    r"""Boundary Shrink: train the data to forget on the class that the original sees just across the boundary.

    Rule: :math:`x' = x + \epsilon \, \mathrm{sign}(\nabla_x L(x, y; \theta_o))`, one step away from the label with a
    frozen copy in eval mode; then minimise the user's own training loss on :math:`(x, y')`, :math:`y'` the class of
    :math:`x'`, over the forget data alone.

    Guarantee: heuristic: the data are taught another label, the one that costs the boundary least.

    Cost: a forward and backward pass, and two forward and one backward pass of the frozen copy, a step.

    Fails: as label flipping: it over-forgets data that were never memorised (see `PushingMethod`), and nothing holds on
    to the data to keep. Inputs must be one floating-point tensor; text has no such step.

    Differs from code in use: the class of :math:`x'` may be the label still, and the code then teaches the label once
    more; here it is the likeliest *other* class at :math:`x'` unless `avoid_true=False`. Inputs are not clipped or
    rounded unless told, because most pipelines normalise them in the data. Running statistics of normalisation layers
    learn nothing from forget batches.

    Args:
        epsilon: Length of the step in units of the inputs; 0.1, the code's for images in [0, 1].
        value_range: Smallest and largest value of an input; (0, 1) in the code.
        levels: What inputs are rounded to, see `gradient_sign_step`; 255 in the code.
        avoid_true: Whether the label itself is never taught (ours). Of multi-label targets the answers at x' are, as
            they come.
        max_steps: Optimizer steps; 20 unless `max_epochs` is given (ours; 10 epochs are common).
        max_epochs: Passes over the forget data instead.
        optimizer: Builds the optimizer; default the user's own, fresh, without schedulers.
        lr_scale: Factor on the user's learning rates; 0.003 (ours: 0.01 destroyed a small network that was
            not watched; rates of 1e-6 to 1e-4 are common).
        stop: See `PushingMethod`.
        check_every: Steps between two looks at the losses.
        forget_statistics: See `ForgetStatistics`.

    Source: Chen et al. 2023, arXiv 2303.11570; read from a port of its code; stopping rule ours.

    >>> BoundaryShrink(value_range=(0.0, 1.0), levels=255, avoid_true=False).epsilon
    0.1
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.FORGET_DATA})
    guarantee: ClassVar[Guarantee] = "heuristic"
    source: ClassVar[str] = "Chen et al. 2023, arXiv 2303.11570"
    parts: ClassVar[tuple[Part, ...]] = ("forget",)
    default_steps: ClassVar[int | None] = 20
    search_space: ClassVar[SearchSpace] = {
        "lr_scale": FloatRange(0.0003, 0.03, log=True),
        "max_steps": IntRange(5, 60, log=True),
        "epsilon": FloatRange(0.03, 0.3, log=True),
        "stop": Choices(("held_out", "retain", None)),
    }

    epsilon: float = 0.1
    value_range: tuple[float, float] | None = None
    levels: int | None = None
    avoid_true: bool = True
    lr_scale: float = 0.003

    def __post_init__(self) -> None:
        super().__post_init__()
        self.epsilon = check_positive("epsilon", self.epsilon, zero=True)
        if self.value_range is not None:
            if len(self.value_range) != 2 or not self.value_range[0] < self.value_range[1]:
                raise ValueError(expected("value_range", "a smaller and a larger number", self.value_range))
            self.value_range = (self.value_range[0], self.value_range[1])  # a file has a list
        self.levels = None if self.levels is None else check_positive_int("levels", self.levels)
        self.avoid_true = bool(self.avoid_true)
        self._original: LightningModule | None = None

    def prepare(self, host: UnlearningHost) -> None:
        """Freeze the original."""
        self._original = host.frozen_twin()

    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Tensor | None:
        """The user's loss on the forget part with the labels from across the boundary."""
        forget = batch["forget"]
        relabelled = host.batch_adapter.replaced(forget, targets=self.nearest_targets(host, forget))
        return as_loss(host.user_step("forget", relabelled, batch_idx))

    def nearest_targets(self, host: UnlearningHost, batch: Any) -> Tensor:
        """What the original sees across the boundary.

        Raises:
            MissingRequirementError: inputs that are no floating-point tensor.
        """
        adapter, original = host.batch_adapter, cast(LightningModule, self._original)
        inputs, targets = adapter.inputs(batch), adapter.targets(batch)
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            rule = "a floating-point tensor for BoundaryShrink, which moves it"
            raise MissingRequirementError(expected("inputs", rule, type(inputs).__name__, "Use LabelFlipping."))
        with torch.enable_grad():
            moving = inputs.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(adapter.loss(adapter.logits(original, moving), targets), moving)
        moved = gradient_sign_step(
            inputs, gradient, epsilon=self.epsilon, value_range=self.value_range, levels=self.levels
        )
        with torch.no_grad():
            logits = adapter.logits(original, moved)
        if targets.is_floating_point():  # yes/no questions, which have no class
            return (logits > 0).to(targets.dtype)
        if self.avoid_true:
            logits = logits.scatter(1, targets.clamp(min=0).unsqueeze(1), -torch.inf)
        # Negative class numbers, which losses take for "to be ignored", stay.
        return torch.where(targets < 0, targets, logits.argmax(1))

    def finish(self, host: UnlearningHost) -> None:
        """Let go of the copy."""
        self._original = None
