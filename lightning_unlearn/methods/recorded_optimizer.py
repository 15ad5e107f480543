"""The optimizer of a recorded run, step by step: what the user's module configures, checked against what was recorded.

A store knows the name, the first learning rate and the momentum of a run's optimizer. Everything else (weight decay,
parameter groups, schedules) comes from the module's own `configure_optimizers`, whose schedules are stepped as a
Trainer steps them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_unlearn.exceptions import MissingRequirementError, StoreMismatchError, UnsupportedStrategyError
from lightning_unlearn.functional.optimizer_maps import AdamMap, MapState, OptimizerMap, Setting, SGDMap
from lightning_unlearn.types import OptimizerInfo
from lightning_unlearn.utilities.checks import check_positive, expected, shorten
from lightning_unlearn.utilities.optimizers import configured_optimizers
from lightning_unlearn.utilities.trainers import idle_trainer

__all__ = ["LearningRate", "RecordedOptimizer", "check_learning_rate"]

LearningRate: TypeAlias = float | Sequence[float] | Callable[[int], float]
"""One rate, one for each step, or a function of the step; for every parameter group."""

_SHARED = ("momentum", "dampening", "nesterov", "betas", "eps", "amsgrad", "maximize", "decoupled_weight_decay")
_GIVE = "Pass `lr=`, a rate for each step (an anchor's optimizer state has that of the step before it)."


class _Planned(Trainer):
    """Answers what a schedule asks of the Trainer about the length of the training."""

    planned_steps: int = 0

    @property
    def estimated_stepping_batches(self) -> int:
        """Steps of the recorded run."""
        return self.planned_steps


def check_learning_rate(lr: LearningRate | None) -> LearningRate | None:
    """The rate as given, after a check of the numbers in it.

    >>> check_learning_rate([0.1, 0.05])
    (0.1, 0.05)
    """
    if lr is None or callable(lr):
        return lr
    if isinstance(lr, Sequence):
        return tuple(check_positive("lr", one, zero=True) for one in lr)
    return check_positive("lr", lr)


@dataclass(frozen=True)
class RecordedOptimizer:
    """The one optimizer of a run.

    Attributes:
        parameters: What it moves, by name, in its own order.
        maps: The map of every step.
        places: Name -> its place in the optimizer's `state_dict`.
    """

    parameters: dict[str, Parameter]
    maps: Sequence[OptimizerMap]
    places: dict[str, int]

    @classmethod
    def of(
        cls,
        module: LightningModule,
        info: OptimizerInfo,
        *,
        steps: int,
        steps_in_epoch: int,
        lr: LearningRate | None = None,
    ) -> RecordedOptimizer:
        """What moved the weights in each step.

        Args:
            module: The user's module.
            info: What the store knows of the optimizer.
            steps: Number of recorded steps.
            steps_in_epoch: After how many of them an epoch ended.
            lr: Learning rates, in the place of those of the configured schedule.

        Raises:
            UnsupportedStrategyError: several optimizers, one that is neither SGD nor Adam nor AdamW, or AMSGrad;
                settings other than learning rate and weight decay that differ from group to group.
            StoreMismatchError: it is configured otherwise than the recorded one was.
            MissingRequirementError: the learning rates cannot be told from the configuration.
        """
        optimizer, schedulers = _configured(module, steps)
        _check_supported(optimizer)
        found = OptimizerInfo(type(optimizer).__name__, float(optimizer.param_groups[0]["lr"]), info.momentum)
        momentum = optimizer.param_groups[0].get("momentum")
        if info.name != found.name or (info.momentum or 0.0) != (momentum or 0.0):
            got = f"{info.name} with momentum {info.momentum}"
            rule = f"recorded with the {found.name}(momentum={momentum}) that the module configures"
            raise StoreMismatchError(expected("store", rule, got, "Configure the optimizer as in the recorded run."))
        rates = _given(lr, steps, len(optimizer.param_groups))
        if rates is None:
            if info.lr != found.lr:
                rule = f"recorded with lr={found.lr}, with which the module's schedule begins"
                raise StoreMismatchError(expected("store", rule, info.lr, _GIVE))
            rates = _scheduled(optimizer, schedulers, steps, steps_in_epoch)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        groups = [[one for one in group["params"] if one.requires_grad] for group in optimizer.param_groups]
        order = [one for group in optimizer.param_groups for one in group["params"]]
        foreign = [tuple(one.shape) for one in order if id(one) not in names]
        if foreign:
            rule = "of the module's own parameters"
            raise UnsupportedStrategyError(expected("optimizer", rule, f"others, of shapes {shorten(foreign)}"))
        parameters = {names[id(one)]: one for group in groups for one in group}
        places = {names[id(one)]: place for place, one in enumerate(order)}
        sizes = [sum(one.numel() for one in group) for group in groups]
        decays = _by_entry([float(group["weight_decay"]) for group in optimizer.param_groups], sizes)
        made: dict[tuple[float, ...], OptimizerMap] = {}
        for rate in rates:
            if rate not in made:
                made[rate] = _map_of(optimizer, _by_entry(rate, sizes), decays)
        return cls(parameters, [made[rate] for rate in rates], places)

    def state_at(self, saved: Mapping[str, Any], count: int, flat: Tensor) -> MapState:
        """The state in an optimizer's `state_dict`, after `count` steps; zeros where it has none of a parameter.

        Args:
            saved: The state dict.
            count: Steps the optimizer had made.
            flat: A vector like the one wanted.
        """
        names = ("momentum_buffer",) if isinstance(self.maps[0], SGDMap) else ("exp_avg", "exp_avg_sq")
        moments = []
        for name in names:
            parts = []
            for parameter, place in ((one, self.places[key]) for key, one in self.parameters.items()):
                value = saved["state"].get(place, {}).get(name)
                parts.append(torch.zeros(parameter.numel()) if value is None else value.flatten())
            moments.append(torch.cat([part.to(flat) for part in parts]))
        return MapState(count, tuple(moments))


def _configured(module: LightningModule, steps: int) -> tuple[Optimizer, list[Any]]:
    before = module._trainer
    trainer = idle_trainer(module, _Planned)
    trainer.planned_steps = steps
    module.trainer = trainer
    try:
        optimizers, schedulers = configured_optimizers(module.configure_optimizers())
    finally:
        module._trainer = before
    if len(optimizers) != 1:
        raise UnsupportedStrategyError(
            expected("configure_optimizers", "returning one optimizer", f"{len(optimizers)}", "Use another method.")
        )
    return optimizers[0], schedulers


def _check_supported(optimizer: Optimizer) -> None:
    groups = optimizer.param_groups
    differing = [name for name in _SHARED if len({str(group.get(name)) for group in groups}) > 1]
    if type(optimizer) not in (SGD, Adam, AdamW):
        rule, got = "SGD, Adam or AdamW, whose steps have a known derivative", type(optimizer).__name__
    elif groups[0].get("amsgrad"):
        rule, got = "without amsgrad, whose maximum has no derivative", "one with it"
    elif groups[0].get("dampening") == 1 and groups[0].get("momentum"):
        rule, got = "with a dampening below 1", "one with 1"
    elif differing:
        rule, got = f"one whose groups share {shorten(differing)}", "groups that differ"
    else:
        return
    raise UnsupportedStrategyError(expected("optimizer", rule, got, "Use another method."))


def _map_of(optimizer: Optimizer, lr: Setting, weight_decay: Setting) -> OptimizerMap:
    group = optimizer.param_groups[0]
    if isinstance(optimizer, SGD):
        return SGDMap(
            lr, group["momentum"], group["dampening"], weight_decay, bool(group["nesterov"]), bool(group["maximize"])
        )
    decoupled = bool(group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)))
    beta1, beta2 = (float(one) for one in group["betas"])
    return AdamMap(lr, beta1, beta2, float(group["eps"]), weight_decay, decoupled, bool(group["maximize"]))


def _by_entry(values: Sequence[float], sizes: Sequence[int]) -> Setting:
    if len(set(values)) == 1:
        return values[0]
    return torch.cat(
        [torch.full((size,), value, dtype=torch.float64) for value, size in zip(values, sizes, strict=True)]
    )


def _beside_rates(optimizer: Optimizer) -> list[tuple[Any, ...]]:
    """What the steps depend on besides the learning rates: a schedule may move momentum as well."""
    return [tuple(group.get(name) for name in (*_SHARED, "weight_decay")) for group in optimizer.param_groups]


def _given(lr: LearningRate | None, steps: int, groups: int) -> list[tuple[float, ...]] | None:
    if lr is None:
        return None
    if isinstance(lr, Sequence) and len(lr) != steps:
        raise StoreMismatchError(expected("lr", f"{steps} rates, one for each recorded step", len(lr)))
    if callable(lr):
        one_by_one = [float(lr(step)) for step in range(steps)]
    else:
        one_by_one = list(lr) if isinstance(lr, Sequence) else [lr] * steps
    return [(float(rate),) * groups for rate in one_by_one]


def _scheduled(
    optimizer: Optimizer, schedulers: Sequence[Any], steps: int, steps_in_epoch: int
) -> list[tuple[float, ...]]:
    """The rates of every step, as a Trainer would have set them."""
    plans = [one if isinstance(one, Mapping) else {"scheduler": one} for one in schedulers]
    for plan in plans:
        if isinstance(plan["scheduler"], ReduceLROnPlateau):
            rule = "known for every step"
            raise MissingRequirementError(expected("lr", rule, "a schedule that followed a metric", _GIVE))
    if steps % steps_in_epoch and any(plan.get("interval", "epoch") == "epoch" for plan in plans):
        rule = f"of whole epochs, to know when a schedule moved ({steps_in_epoch} batches each)"
        raise MissingRequirementError(expected("store", rule, f"{steps} steps", _GIVE))
    rates = []
    fixed = _beside_rates(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no step of the optimizer goes before the schedule's, as is intended
        for step in range(steps):
            if _beside_rates(optimizer) != fixed:
                rule, got = "moving nothing but learning rates", f"one that moves others as well, at step {step}"
                remedy = "Such a run cannot be followed (OneCycleLR has cycle_momentum=True by default): use `Retrain`."
                raise UnsupportedStrategyError(expected("the module's schedule", rule, got, remedy))
            rates.append(tuple(float(group["lr"]) for group in optimizer.param_groups))
            epoch, place = divmod(step, steps_in_epoch)
            for plan in plans:
                every = int(plan.get("frequency", 1))
                if plan.get("interval", "epoch") == "step":
                    due = (place + 1) % every == 0
                else:
                    due = place + 1 == steps_in_epoch and (epoch + 1) % every == 0
                if due and step + 1 < steps:
                    plan["scheduler"].step()
    return rates
