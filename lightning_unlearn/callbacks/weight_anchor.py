"""The weights that a training is held to, or measured against: those it starts from, or what is held elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_unlearn.callbacks.anchor_sources import WeightSource, read_weights
from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.distributed import gather, on_rank_zero
from lightning_unlearn.utilities.sharded import local_part, local_part_like

__all__ = ["Anchored", "WeightAnchor"]


class WeightAnchor:
    """Parameters of a module, and the values that they are compared with.

    Only parameters that need a gradient have a value; one that is unfrozen later gets the one it has then, which it had
    all along. Of sharded parameters every process holds its part.

    In checkpoints: the values, for a resumed training starts from other ones. Not where something else holds them: a
    file or store that they were read from, or the store of a `DeltaRecorder` that records this very training.

    Args:
        source: Where values come from; `None` for the weights that the training starts from.
        patterns: Patterns (`fnmatch`) of the names of parameters to take; all of them by default.
        moving: Whether the values will be changed, so that they are this anchor's own; without a `source` only.
    """

    def __init__(
        self, source: WeightSource | None = None, patterns: Sequence[str] | None = None, *, moving: bool = False
    ) -> None:
        self._source = source
        self._patterns = patterns
        self._moving = moving
        self._known: Mapping[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._store: DeltaStore | None = None
        self._alike: list[WeightAnchor] = []
        self._resumed: Mapping[str, Any] | None = None
        self._foreign = self._settled = False

    def bind(self, module: LightningModule) -> None:
        """Take the parameters of a module that is set up; before its first forward pass, which may unshard them.

        Raises:
            ValueError: a pattern matches no parameter.
        """
        names = dict(module.named_parameters())
        for pattern in self._patterns or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                remedy = f"There are {shorten(names)}."
                raise ValueError(expected("layers", "patterns that match parameters", pattern, remedy))
        self._parameters = {
            name: parameter
            for name, parameter in names.items()
            if self._patterns is None or any(fnmatchcase(name, pattern) for pattern in self._patterns)
        }
        self._values, self._settled, self._store, self._alike = {}, False, None, []

    def settle(self, trainer: Trainer) -> None:
        """Decide where values come from; before the first step, with recorders already at work.

        Raises:
            MissingRequirementError: the training is resumed from a checkpoint that does not hold them, or the source
                lacks some.
            ValueError: the source has values of another shape.
        """
        if self._settled:
            return
        resumed, foreign = self._resumed, self._foreign
        self._resumed, self._foreign, self._settled = None, False, True
        if self._source is not None:
            self._known = read_weights(self._source)
        elif resumed is not None:
            self._known = self._from_checkpoint(trainer, resumed)
        elif foreign:
            rule, got = (
                "one that was written with this callback",
                "one without the weights that the training began with",
            )
            remedy = "Pass the checkpoint, or the store, that holds those weights as `anchor`."
            raise MissingRequirementError(expected("ckpt_path", rule, got, remedy))
        elif not self._moving:
            self._store, self._known = self._recorded(trainer)
            self._alike = [one for one in _anchors(trainer) if one is not self and one.is_start]
        self._check(complete=self._source is not None)
        self.current()

    @property
    def is_start(self) -> bool:
        """Whether the values are those that the training under way started from, and nothing else."""
        return self._settled and self._source is None and not self._moving

    def current(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The parameters that need a gradient now, and this process's part of their values."""
        active = {name: one for name, one in self._parameters.items() if one.requires_grad}
        for name, parameter in active.items():
            if name not in self._values:
                self._values[name] = self._value(name, parameter)
        return list(active.values()), [self._values[name] for name in active]

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the values to the parameters: each becomes `decay` times itself and the rest of what the weight is."""
        parameters, values = self.current()
        if parameters:
            torch._foreach_lerp_(values, [local_part(one) for one in parameters], 1 - decay)

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold; on sharded parameters every process has to ask."""
        if self._store is not None:
            return {"store_id": self._store.store_id}
        if not self._settled or self._source is not None:
            return {}
        return {"values": {name: _whole(one, self._parameters[name]) for name, one in self._values.items()}}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take what a checkpoint held."""
        self._resumed, self._foreign = state, False

    def resume_foreign(self) -> None:
        """Take note that the training goes on from a checkpoint which holds nothing of this."""
        self._foreign = True

    def _from_checkpoint(self, trainer: Trainer, state: Mapping[str, Any]) -> Mapping[str, Tensor]:
        if "store_id" not in state:
            values: Mapping[str, Tensor] = state["values"]
            return values
        for store, weights in _recording_stores(trainer):
            if store.store_id == state["store_id"]:
                self._store = store
                return weights
        rule, remedy = (
            "resumed with the `DeltaRecorder` whose store holds the initial weights",
            "Or pass it as `anchor`.",
        )
        raise MissingRequirementError(expected("training", rule, "resumed without it", remedy))

    def _recorded(self, trainer: Trainer) -> tuple[DeltaStore | None, Mapping[str, Tensor]]:
        """A store that holds just the weights that the training starts from, and these weights."""
        active = {name: one for name, one in self._parameters.items() if one.requires_grad}
        for store, known in _recording_stores(trainer):
            same = all(
                name in known and torch.equal(local_part_like(known[name], one).cpu(), local_part(one).detach().cpu())
                for name, one in active.items()
            )
            # One answer for all processes: of a small layer one of them may hold everything, and another nothing.
            if trainer.strategy.reduce_boolean_decision(same, all=True):
                return store, known
        return None, {}

    def _check(self, *, complete: bool) -> None:
        trained = [name for name, one in self._parameters.items() if one.requires_grad]
        lacking = [name for name in trained if name not in self._known]
        if complete and lacking:
            got = f"none for {shorten(lacking)}"
            raise MissingRequirementError(expected("anchor", "weights with a value for each parameter", got))
        for name in set(trained) - set(lacking):
            shape, got_shape = self._parameters[name].shape, self._known[name].shape
            if shape != got_shape:
                raise ValueError(expected("anchor", f"of shape {tuple(shape)} for {name}", tuple(got_shape)))

    def _value(self, name: str, parameter: nn.Parameter) -> Tensor:
        for anchor in self._alike:  # who has them already, for another callback
            if anchor._parameters.get(name) is parameter and name in anchor._values:
                return anchor._values[name]
        if name not in self._known:
            return local_part(parameter).detach().clone()
        mine = local_part(parameter)
        return local_part_like(self._known[name], parameter).detach().to(mine.device, mine.dtype)


class Anchored(Callback):
    """A callback with an anchor, which is bound and resumed here; `weight_anchor` is set by the subclass."""

    weight_anchor: WeightAnchor

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the parameters, as they are set up and before anything has run through the module."""
        self.weight_anchor.bind(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notice a checkpoint that was written without this callback."""
        if not checkpoint.get("callbacks", {}).get(self.state_key):
            self.weight_anchor.resume_foreign()


def _anchors(trainer: Trainer) -> list[WeightAnchor]:
    callbacks: list[Any] = vars(trainer)["callbacks"]
    return [one.weight_anchor for one in callbacks if isinstance(one, Anchored)]


def _recording_stores(trainer: Trainer) -> list[tuple[DeltaStore, Mapping[str, Tensor]]]:
    """Stores of this training, and the weights that they began with; collective, for all stores on all ranks alike."""
    callbacks: list[Any] = vars(trainer)["callbacks"]
    stores = [one.store for one in callbacks if isinstance(one, DeltaRecorder)]
    return [(store, _initial_weights(trainer, store)) for store in stores if store is not None]


def _initial_weights(trainer: Trainer, store: DeltaStore) -> Mapping[str, Tensor]:
    if any(gather(trainer.strategy, store.is_part)):  # ranks of another node than rank 0's: no weights are there
        return on_rank_zero(trainer.strategy, store.initial_weights)
    return store.initial_weights()


def _whole(value: Tensor, parameter: Tensor) -> Tensor:
    """A part of a sharded parameter's value together with the others', on the host."""
    if isinstance(parameter, DTensor):
        sharded = DTensor.from_local(
            value,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        value = sharded.full_tensor()
    return value.detach().cpu()
