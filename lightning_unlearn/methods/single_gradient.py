"""Single-gradient unlearning: add back the first-order effect that the forgotten samples had on the weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_unlearn.exceptions import MissingRequirementError, UnlearningWarning
from lightning_unlearn.methods.base import EditContext, Guarantee, Requirement, WeightEdit, hyperparameters
from lightning_unlearn.methods.batch_gradients import as_change, gradient_sum, split_data, trainable
from lightning_unlearn.methods.recorded_uses import Rates, uses_by_anchor
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import FloatRange, SearchSpace
from lightning_unlearn.types import WeightChange
from lightning_unlearn.utilities.batch_norm import frozen_statistics, tracking_layers
from lightning_unlearn.utilities.batches import leading_size
from lightning_unlearn.utilities.checks import check_choice, check_positive, check_positive_int, expected
from lightning_unlearn.utilities.modes import preserved_buffers
from lightning_unlearn.utilities.parameters import change_norm, float_buffers, parameter_distance

__all__ = ["SingleGradient"]


@register
@hyperparameters
class SingleGradient(WeightEdit):
    r"""Add :math:`\eta` times every use of the forgotten samples, as if each had been a step from the initial weights.

    Rule: :math:`\theta_u = \theta + \frac{\eta m}{b} \sum_{x \in D_f} \nabla L(\theta_0; x)` with the learning rate
    :math:`\eta`, the number of epochs m and the batch size b of the training, and the weights :math:`\theta_0` that it
    began with. With a store, :math:`m / b` is what was recorded: the sum over steps of the share of their batch.

    Guarantee: approximate, to first order in the learning rate. Exact only for a loss linear in the weights and plain
    SGD; a short fine-tuning is what it was made for.

    Cost: one backward pass over the data to forget (one for each anchor).

    Fails: nearly everywhere else. Past a few epochs the step is too long by orders of magnitude, because training
    contracts what early steps did; measured on small networks trained from scratch it cost 3 to 62 points of accuracy
    and lay further from the retrained model than doing nothing. `max_relative_norm` therefore shortens the step, with
    a warning that says by how much, and the shortened step has nothing of the paper's but the direction.

    Differs from the official code: none for a forget set that is one full batch, but for the shortening. Momentum and
    weight decay are ignored, as there. `anchor="per_epoch"` takes gradients at the latest recorded anchor before a use;
    the code's variant takes them right after each use.

    Args:
        anchor: `"initial"`: all gradients at the initial weights (the paper). `"per_epoch"`: at the anchors that the
            store recorded, one for each epoch with `anchor_every` set to the steps of an epoch.
        lr: Learning rate; by default that at the start of each recorded run. With a schedule give its mean.
        epochs: How often every forgotten sample was used; by default as recorded.
        batch_size: By default that of every recorded step.
        max_relative_norm: Longest step, relative to the distance of the weights from the initial ones; `None` for the
            paper's. 0.05 is ours: above it subtractions cost more than a point of accuracy (small networks).
        initial_weights: Weights before training by name (`module.state_dict()`), where no store has them.
        statistics: What normalisation layers use at the anchor: those of the `"batch"`, as the training step did, or
            the `"running"` ones of the anchor, as for batches of a single sample in any case.

    Source: Thudi, Deza, Chandrasekaran, Papernot 2022, arXiv 2109.13398.

    >>> SingleGradient(lr=0.01, epochs=1, batch_size=32).anchor
    'initial'
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.FORGET_DATA, Requirement.INITIAL_WEIGHTS})
    guarantee: ClassVar[Guarantee] = "approximate"
    source: ClassVar[str] = "Thudi, Deza, Chandrasekaran, Papernot 2022, arXiv 2109.13398"
    # Everything else describes how the training was, and is no choice.
    search_space: ClassVar[SearchSpace] = {
        "max_relative_norm": FloatRange(0.01, 0.5, log=True),
    }

    anchor: Literal["initial", "per_epoch"] = "initial"
    lr: float | None = None
    epochs: float | None = None
    batch_size: int | None = None
    max_relative_norm: float | None = 0.05
    initial_weights: Mapping[str, Tensor] | None = field(default=None, repr=False)
    statistics: Literal["batch", "running"] = "batch"

    def __post_init__(self) -> None:
        self.anchor = check_choice("anchor", self.anchor, ("initial", "per_epoch"))
        self.lr = None if self.lr is None else check_positive("lr", self.lr)
        self.epochs = None if self.epochs is None else check_positive("epochs", self.epochs)
        self.batch_size = None if self.batch_size is None else check_positive_int("batch_size", self.batch_size)
        self.max_relative_norm = (
            None if self.max_relative_norm is None else check_positive("max_relative_norm", self.max_relative_norm)
        )
        self.statistics = check_choice("statistics", self.statistics, ("batch", "running"))

    def missing(self, available: Iterable[Requirement]) -> list[Requirement]:
        """As the base; given `initial_weights` stand in for the store's."""
        missing = super().missing(available)
        if self.initial_weights is None:
            return missing
        return [item for item in missing if item != Requirement.INITIAL_WEIGHTS]

    def compute_edit(self, context: EditContext) -> WeightChange:
        """The sum of gradients, shortened to `max_relative_norm`.

        Raises:
            MissingRequirementError: no data or initial weights; a rate, number of epochs or batch size that is neither
                given nor recorded; or no anchors for `"per_epoch"`.
            StoreMismatchError: parameters that were frozen in the recorded training have other values now.
        """
        data, parameters = split_data(self, context), trainable(context.module)
        start = self._start(context, parameters)
        rates = Rates(self.lr, self.epochs, self.batch_size)
        n = len(data.forget_positions)
        total = torch.zeros(sum(one.numel() for one in parameters.values()), dtype=torch.float64)
        for step, rate in uses_by_anchor(self.name, context, rates, n, anchored=self.anchor == "per_epoch").items():
            weights = start
            if step and context.store is not None:
                weights = {**start, **(context.store.read_anchor(step).weights or {})}
            with _at(context.module, weights):
                gradient, _ = gradient_sum(self._loss(context), data.forget_loader(), parameters)
            total = total.to(gradient.device) + rate * gradient.double()
        return self._shortened(as_change(total, parameters), parameter_distance(context.module, start))

    def _start(self, context: EditContext, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.initial_weights is not None:
            start = dict(self.initial_weights)
        elif context.store is not None:
            start = context.store.initial_weights()
            context.store.check_frozen(context.module, known=start)
        else:
            raise MissingRequirementError(f"{self.name} needs {Requirement.INITIAL_WEIGHTS.value}.")
        lacking = [name for name, one in parameters.items() if name not in start or start[name].shape != one.shape]
        if lacking:
            rule = "those of every trainable parameter, in its shape"
            raise MissingRequirementError(expected("initial_weights", rule, f"none for {lacking[0]}"))
        return start

    def _loss(self, context: EditContext) -> Callable[[Any], Tensor | None]:
        layers = tracking_layers(context.module)

        def loss(batch: Any) -> Tensor | None:
            if self.statistics == "running" or leading_size(batch) == 1:  # one sample has no statistics
                return context.loss(batch)
            with frozen_statistics(context.module, "batch"):
                for layer in layers:
                    layer.training = True
                return context.loss(batch)

        return loss

    def _shortened(self, change: WeightChange, travel: float) -> WeightChange:
        norm = change_norm(change)
        if self.max_relative_norm is None or norm <= self.max_relative_norm * travel:
            return change
        scale = self.max_relative_norm * travel / norm
        warnings.warn(
            f"{self.name} was shortened to {self.max_relative_norm:.2g} of the distance from the initial weights; the "
            f"paper's step is {1 / scale if scale else float('inf'):.3g} times as long and would harm most models "
            "(`max_relative_norm=None` takes it).",
            UnlearningWarning,
            stacklevel=2,
        )
        return {name: scale * tensor for name, tensor in change.items()}


@contextmanager
def _at(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The module at other weights inside, bit for bit as it was afterwards."""
    own = {**dict(module.named_parameters()), **float_buffers(module)}
    before = {name: own[name].detach().clone() for name in weights if name in own}
    with preserved_buffers(module):
        try:
            with torch.no_grad():
                for name in before:
                    own[name].copy_(weights[name])
            yield
        finally:
            with torch.no_grad():
                for name, tensor in before.items():
                    own[name].copy_(tensor)
