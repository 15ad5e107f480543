"""Retraining without the forgotten samples: the reference of every table."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningModule, seed_everything
from torch import nn

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods.base import Guarantee, Procedure, ProcedureContext, Requirement, hyperparameters
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.replay import replayable_batches
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.batch_norm import tracking_layers
from lightning_unlearn.utilities.checks import check_choice, expected
from lightning_unlearn.utilities.parameters import float_buffers
from lightning_unlearn.utilities.rng import RngState

__all__ = ["Retrain", "restore_initial_weights"]


@register
@hyperparameters
class Retrain(Procedure):
    r"""Train again from the initial weights, on the retain data only, with the user's own optimizers and schedules.

    Guarantee: exact. The result never saw a forgotten sample.

    Cost: one full training; give its length in the Trainer's arguments.

    With `order="same"` it is a *twin* of the original run wherever the order of the user's batches is fixed (by a
    seed and the epoch, or by the sampler): same initial weights, same batches, only the forgotten samples left out.
    `order="recorded"` is the twin of any recorded run: it replays the batches in the store, whatever had shuffled them,
    and puts back the random state behind every step of which the store has an anchor (`anchor_every=1` for dropout and
    augmentation drawn in the main process; workers have random states of their own). Weight distances mean something
    against a twin only. `order="fresh"` gives the retain data to a loader of its own; several processes need it.

    Args:
        module_factory: Builds the untrained module; by default the trained module with the store's initial weights.
        order: See above.

    >>> Retrain()
    Retrain(order='same')
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.RETAIN_DATA, Requirement.INITIAL_WEIGHTS})
    guarantee: ClassVar[Guarantee] = "exact"
    source: ClassVar[str] = "the reference of every paper"

    module_factory: Callable[[], LightningModule] | None = field(default=None, repr=False)
    order: Literal["same", "recorded", "fresh"] = "same"

    def __post_init__(self) -> None:
        self.order = check_choice("order", self.order, ("same", "recorded", "fresh"))

    def missing(self, available: Iterable[Requirement]) -> list[Requirement]:
        """As the base; a `module_factory` stands in for the initial weights."""
        missing = super().missing(available)
        if self.module_factory is None:
            return missing
        return [item for item in missing if item != Requirement.INITIAL_WEIGHTS]

    def run(self, context: ProcedureContext) -> LightningModule:
        """Train from scratch and return the module.

        Raises:
            MissingRequirementError: neither a store nor a `module_factory` gives the initial weights.
            StoreMismatchError: parameters that were frozen in the recorded training have other values now; or the
                recorded batches cannot be replayed (see `replayable_batches`).
        """
        replay: dict[str, Any] = {}
        if self.order == "recorded":
            if context.store is None:
                raise MissingRequirementError(f"Retrain(order='recorded') needs {Requirement.DELTAS.value}.")
            replay = {"batches": replayable_batches(context.store, context.module, context.data)}
            if context.store.anchors:
                replay["random_states"] = partial(_random_state, context.store)
        if self.module_factory is not None:
            module = self.module_factory()
        elif context.store is not None:
            module = context.module
            initial = context.store.initial_weights()
            context.store.check_frozen(module, known=initial)
            restore_initial_weights(module, initial, unchanged=context.store.frozen)
        else:
            raise MissingRequirementError(f"Retrain needs {Requirement.INITIAL_WEIGHTS.value}.")
        if context.seed is not None:
            seed_everything(context.seed, workers=True, verbose=False)
        data = context.data
        if self.order != "fresh":
            context.make_trainer(leave_out=data.forget_positions, **replay).fit(module, datamodule=data.users_data)
        else:
            context.make_trainer().fit(module, datamodule=data.retain_only())
        return module


def _random_state(store: DeltaStore, step: int) -> RngState | None:
    return store.read_anchor(step).rng if step in store.anchors else None


@torch.no_grad()
def restore_initial_weights(
    module: nn.Module, initial: Mapping[str, torch.Tensor], *, unchanged: Container[str] = ()
) -> None:
    """Put recorded initial values into parameters and float buffers, and the batch counters of normalisation to zero.

    Other integer and boolean buffers (masks, position numbers) are constants of the architecture and stay.

    Args:
        module: The module.
        initial: Recorded values by name.
        unchanged: Parameters that still have their initial values.

    Raises:
        ValueError: a parameter has no recorded initial value; nothing was changed.
    """
    tensors = {**dict(module.named_parameters()), **float_buffers(module)}
    unknown = [name for name, _ in module.named_parameters() if name not in initial and name not in unchanged]
    if unknown:
        raise ValueError(expected("initial", "values for every parameter", f"none for {unknown[0]}"))
    for name, tensor in tensors.items():
        if name in initial:
            tensor.copy_(initial[name])
    for layer in tracking_layers(module):
        if layer.num_batches_tracked is not None:  # it only matters for momentum=None, where zero is right
            layer.num_batches_tracked.zero_()
