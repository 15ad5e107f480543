"""One run's place in a store: opening or creating it, resuming, and saying which weights contain which steps."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning import Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_unlearn.callbacks.recording_checks import NEW_STORE, describe_optimizer
from lightning_unlearn.callbacks.run_origin import RunOrigin, open_or_create
from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.joined_writer import JoinedWriter
from lightning_unlearn.store.lineage import RunKind
from lightning_unlearn.store.writer import Background, StoreWriter
from lightning_unlearn.types import DataFingerprint, ModelState, RecordingSettings
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.distributed import on_every_rank, on_rank_zero
from lightning_unlearn.utilities.parameters import (
    parameter_distance,
    parameter_norm,
    weights_digest,
)
from lightning_unlearn.utilities.rng import capture_rng

__all__ = ["RecordingSession"]

_PATIENCE = 5.0
"""Seconds that rank 0 waits for the steps of ranks that it cannot talk to any more."""

Ranges = tuple[tuple[int, int], ...]


def _with_range(ranges: Ranges, start: int, stop: int) -> Ranges:
    if start == stop:
        return ranges
    if ranges and ranges[-1][1] == start:
        return (*ranges[:-1], (ranges[-1][0], stop))
    return (*ranges, (start, stop))


class RecordingSession:
    """A store opened for one run, on every rank; made by `RecordingSession.open`.

    Attributes:
        store: The store.
        writer: This rank's writer.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: nn.Module,
        store: DeltaStore,
        writer: StoreWriter | JoinedWriter,
        origin: RunOrigin,
    ) -> None:
        self.store = store
        self.writer = writer
        self._trainer = trainer
        self._origin = origin
        self._last: tuple[str, int] | None = None
        known = store.initial_weights() if store.frozen else {}
        self._left_out = {
            id(parameter): name
            for name, parameter in module.named_parameters()
            if name in store.frozen and name not in known
        }

    @classmethod
    def open(
        cls,
        trainer: Trainer,
        module: nn.Module,
        url: str | os.PathLike[str],
        *,
        settings: RecordingSettings,
        data: DataFingerprint,
        optimizers: Sequence[Optimizer],
        kind: RunKind,
        resume: Mapping[str, Any] | None,
        size_budget: int | None,
        background: Background,
    ) -> RecordingSession:
        """Create the store, or open it and find out how the weights at hand relate to it; collective over ranks.

        Args:
            trainer: The Trainer that is about to train.
            module: The module that is recorded.
            url: Where the store is.
            settings: How to record.
            data: What the loaders deliver.
            optimizers: The Trainer's optimizers.
            kind: Whether this is ordinary training or a repair after an edit.
            resume: `state()` of the checkpoint that is being resumed.
            size_budget: Bound on the bytes of deltas, over all ranks.
            background: What threads do, see `StoreWriter`.

        Raises:
            StoreMismatchError: the store is of another model, other data, other settings or another run.
        """
        world_size = trainer.world_size
        infos = tuple(map(describe_optimizer, optimizers))
        origin = on_rank_zero(
            trainer.strategy, partial(open_or_create, url, module, settings, data, world_size=world_size, resume=resume)
        )
        budget = None if size_budget is None else size_budget // world_size
        opened: list[tuple[DeltaStore, StoreWriter | JoinedWriter]] = []

        def open_here() -> None:
            store = DeltaStore.open(url)
            if world_size == 1 < store.world_size:
                opened.append((store, JoinedWriter(store, size_budget=budget, background=background)))
            else:
                rank = trainer.global_rank
                opened.append((store, store.writer(rank, size_budget=budget, background=background)))

        try:
            on_every_rank(trainer.strategy, open_here, name="store", rule="one that every rank could open")
        except BaseException:
            for _, writer in opened:
                writer.abandon()
            raise
        (store, writer) = opened[0]
        try:
            # Decided together, so that no rank waits for one that has given up.
            if trainer.strategy.reduce_boolean_decision(writer.n_steps < origin.n_steps, all=False):
                rule = f"a store in which every rank has {origin.n_steps} steps"
                got = f"{writer.n_steps} of rank {writer.rank}"
                raise StoreMismatchError(expected("store", rule, got, NEW_STORE))
            # Not before the writers are there: a recording that is under way keeps what is known of it.
            on_rank_zero(trainer.strategy, lambda: store.truncate_states(origin.n_steps))
            # Steps after the checkpoint belong to a branch of the training that no weights continue.
            on_every_rank(
                trainer.strategy,
                lambda: writer.truncate(origin.n_steps) if writer.n_steps > origin.n_steps else None,
                name="store",
                rule="one that every rank could truncate",
            )
            on_rank_zero(trainer.strategy, lambda: store.begin_run(kind, infos, resumed=resume is not None))
            return cls(trainer, module, store, writer, origin)
        except BaseException:
            writer.abandon()
            raise

    def about_to_train(self, optimizer: Optimizer) -> None:
        """To be called before every step: parameters whose initial values were left out may be trained from now on.

        Raises:
            StoreMismatchError: something else has changed them since the recording began; on every rank.
        """
        if not self._left_out:
            return
        found = {
            self._left_out[id(parameter)]: parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self._left_out and (parameter.requires_grad or parameter.grad is not None)
        }
        if found:
            self.store.check_unchanged(found)
            if self._trainer.is_global_zero:
                self.store.add_initial(found)
            self._left_out = {key: name for key, name in self._left_out.items() if name not in found}

    def moved(self, module: nn.Module) -> list[str]:
        """Names of parameters that were frozen as the recording began, still are, and have changed all the same.

        Adapters that are merged into the base model for validation, and taken out again, leave it rounded.
        """
        parameters = dict(module.named_parameters())
        return self.store.changed_since_start({name: parameters[name] for name in self._left_out.values()})

    def anchor(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Keep the state of the training as it is after the last appended step.

        Weights and optimizers agree on all ranks, so rank 0 keeps them; random states do not. Frozen parameters whose
        values the store does without are left out here as well.
        """
        if not self._trainer.is_global_zero:
            self.writer.anchor(None, None, capture_rng())
            return
        left_out = set(self._left_out.values())
        # A counter of batches decides what a cumulative average does next, so buffers of integers are state as well.
        buffers = {name: buffer for name, buffer in module.named_buffers() if not buffer.is_complex()}
        tensors = {**dict(module.named_parameters()), **buffers}
        weights = {name: tensor.detach() for name, tensor in tensors.items() if name not in left_out}
        self.writer.anchor(weights, [optimizer.state_dict() for optimizer in optimizers], capture_rng())

    def state(self, module: nn.Module, *, drifted: bool = False, collective: bool = True) -> dict[str, Any]:
        """Publish what was appended, and make the weights at hand known to the store.

        Args:
            module: The module that is recorded, as it is after the last appended step.
            drifted: Whether something other than an optimizer changed this rank's layers since that step.
            collective: Whether all ranks do this together; rank 0 then waits until the others have published. Alone
                among several (after an error) it looks for their steps in the store for a few seconds, and does not
                make the weights known where some are missing.

        Returns:
            Plain data for a checkpoint; complete on rank 0, the only one that writes checkpoints.

        Raises:
            LightningUnlearnError: another rank could not publish its steps, and says why.
        """
        together = collective or self._trainer.world_size == 1
        if together:
            # Publish on every rank, or fail on every rank: nobody waits for one that has given up.
            rule = "steps that every rank could publish"
            on_every_rank(self._trainer.strategy, self.writer.flush, name="recording", rule=rule)
            drifted = self._trainer.strategy.reduce_boolean_decision(drifted, all=False)
        else:
            self.writer.flush()
        n_steps = self.writer.n_steps
        if not together and self._trainer.is_global_zero:
            together = self._all_published(n_steps)
        ranges = _with_range(self._origin.ranges, self._origin.n_steps, n_steps)
        digest = ""
        if self._trainer.is_global_zero:
            digest = weights_digest(module)
            # Steps that change no weight (a learning rate of zero) are in the weights as well, or they would pass for
            # those of a run that was given up.
            if together and (digest, n_steps) != self._last:
                travel = parameter_distance(module, self.store.initial_weights())
                norm = parameter_norm(module)
                self.store.add_state(ModelState(digest, ranges, self._origin.edits, travel, norm, drifted))
                self._last = (digest, n_steps)
        return {
            "store_id": self.store.store_id,
            "n_steps": n_steps,
            "ranges": [list(item) for item in ranges],
            "edits": list(self._origin.edits),
            "digest": digest,
        }

    def _all_published(self, n_steps: int) -> bool:
        until = time.monotonic() + _PATIENCE
        while True:
            self.store.refresh()
            if self.store.n_steps >= n_steps or time.monotonic() > until:
                return self.store.n_steps >= n_steps
            time.sleep(_PATIENCE / 100)
