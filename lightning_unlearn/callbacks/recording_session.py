"""One run's place in a store: opening or creating it, resuming, and saying which weights contain which steps."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from lightning import Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_unlearn.callbacks.rank_parts import RankParts, open_parts
from lightning_unlearn.callbacks.recording_checks import describe_optimizer
from lightning_unlearn.callbacks.run_origin import RunOrigin, open_or_create
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.store.lineage import RunKind
from lightning_unlearn.store.writer import Background
from lightning_unlearn.types import DataFingerprint, LayerPiece, ModelState, RecordingSettings
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.distributed import gather, on_every_rank, on_rank_zero
from lightning_unlearn.utilities.parameters import change_norm, gathered_weights, tensors_digest, tensors_distance
from lightning_unlearn.utilities.rng import capture_rng
from lightning_unlearn.utilities.whole_weights import WholeWeights, is_sharded, named_parameters

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


def _nothing() -> None:
    """What a rank does where another one has work."""


class RecordingSession:
    """A store opened for one run, on every rank; made by `RecordingSession.open`.

    Attributes:
        store: The store, or this node's part of it where its ranks do not see what rank 0 writes to.
        writer: This rank's writer.
        first_piece: Number of the first piece of the run's layout.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: nn.Module,
        parts: RankParts,
        origin: RunOrigin,
        known: Collection[str],
    ) -> None:
        self.store = parts.store
        self.writer = parts.writer
        self._elsewhere = parts.elsewhere
        self.first_piece = origin.first_piece
        self._trainer = trainer
        self._module = module
        self._sharded = is_sharded(module)
        self._origin = origin
        self._last: tuple[str, int] | None = None
        # As they are recorded: of a sharded module without what wrappers put into names.
        parameters = named_parameters(module) if self._sharded else dict(module.named_parameters())
        self._left_out = {
            id(parameter): name
            for name, parameter in parameters.items()
            if name in self.store.frozen and name not in known
        }

    @classmethod
    def open(
        cls,
        trainer: Trainer,
        module: nn.Module,
        url: str | os.PathLike[str],
        *,
        weights: WholeWeights,
        pieces: Sequence[LayerPiece] = (),
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
            weights: Its weights (`gathered_weights`).
            pieces: What the layers are cut into.
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
        begin = partial(
            open_or_create, url, weights, settings, data, world_size=world_size, resume=resume, pieces=pieces
        )
        origin = on_rank_zero(trainer.strategy, begin)
        budget = None if size_budget is None else size_budget // world_size
        parts = open_parts(
            trainer, url, origin.n_steps, size_budget=budget, background=background, pieces=origin.pieces
        )
        store, writer = parts.store, parts.writer
        try:
            # Not before the writers are there: a recording that is under way keeps what is known of it.
            on_rank_zero(trainer.strategy, lambda: store.truncate_states(origin.n_steps))
            on_rank_zero(trainer.strategy, lambda: parts.truncate_copies(origin.n_steps))
            # Steps after the checkpoint belong to a branch of the training that no weights continue.
            truncate = partial(writer.truncate, origin.n_steps) if writer.n_steps > origin.n_steps else _nothing
            on_every_rank(trainer.strategy, truncate)
            first_step = partial(store.begin_run, kind, infos, resumed=resume is not None, first=origin.n_steps)
            on_rank_zero(trainer.strategy, first_step)
            known = on_rank_zero(trainer.strategy, lambda: set(store.initial_weights()) if store.frozen else set())
            return cls(trainer, module, parts, origin, known)
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
            if id(parameter) in self._left_out
            # Under sharding a process may have a gradient and another none, and all must come to the same answer.
            and (parameter.requires_grad or (parameter.grad is not None and not self._sharded))
        }
        if found:
            weights = gathered_weights(self._module).parameters
            initial = {name: weights[name] for name in found}
            if self._sharded:
                on_rank_zero(self._trainer.strategy, lambda: self.store.add_initial(initial))
            else:
                self.store.check_unchanged(initial)  # on every rank, so that what is found stops all of them
                if self._trainer.is_global_zero:
                    self.store.add_initial(initial)
            self._left_out = {key: name for key, name in self._left_out.items() if name not in found}

    def weights(self, *, collective: bool = True) -> WholeWeights | None:
        """The weights as they are, whole; of a sharded module on rank 0, and on no rank unless all of them ask."""
        return gathered_weights(self._module) if collective or not self._sharded else None

    def moved(self, weights: WholeWeights | None) -> list[str]:
        """Names of parameters that were frozen as the recording began, still are, and have changed all the same.

        Adapters that are merged into the base model for validation, and taken out again, leave it rounded.

        Args:
            weights: What `weights` returned; where a rank has none, another one looks.
        """
        if weights is None or (self._sharded and not self._trainer.is_global_zero):
            return []
        return self.store.changed_since_start({name: weights.parameters[name] for name in self._left_out.values()})

    def anchor(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Keep the state of the training as it is after the last appended step.

        Weights and optimizers agree on all ranks, so rank 0 keeps them; random states do not. Frozen parameters whose
        values the store does without are left out here as well. An optimizer of which every rank has a part
        (`ZeroRedundancyOptimizer`) is put together first, by all ranks.
        """
        states = [self._trainer.strategy.optimizer_state(optimizer) for optimizer in optimizers]
        if not self._trainer.is_global_zero:
            self.writer.anchor(None, None, capture_rng())
            return
        left_out = set(self._left_out.values())
        # A counter of batches decides what a cumulative average does next, so buffers of integers are state as well.
        buffers = {name: buffer for name, buffer in module.named_buffers() if not buffer.is_complex()}
        tensors = {**dict(module.named_parameters()), **buffers}
        weights = {name: tensor.detach() for name, tensor in tensors.items() if name not in left_out}
        self.writer.anchor(weights, states, capture_rng())

    def state(self, weights: WholeWeights | None, *, drifted: bool = False, collective: bool = True) -> dict[str, Any]:
        """Publish what was appended, and make the weights at hand known to the store.

        Args:
            weights: Those after the last appended step; without any they are not made known.
            drifted: Whether something other than an optimizer changed this rank's layers since that step.
            collective: Whether all ranks do this together; rank 0 then waits until the others have published. Alone
                among several (after an error) it looks for their steps in the store for a few seconds, and does not
                make the weights known where some are missing, or on other nodes.

        Returns:
            Plain data for a checkpoint; complete on rank 0, the only one that writes checkpoints.

        Raises:
            LightningUnlearnError: another rank could not publish its steps, and says why.
            UnsupportedStrategyError: under DDP, the weights of the ranks went apart; on every rank.
        """
        together = collective or self._trainer.world_size == 1
        if together:
            # Publish on every rank, or fail on every rank: nobody waits for one that has given up.
            on_every_rank(self._trainer.strategy, self.writer.flush)
            drifted = self._trainer.strategy.reduce_boolean_decision(drifted, all=False)
        else:
            self.writer.flush()
        n_steps = self.writer.n_steps
        if not together and self._trainer.is_global_zero:
            together = self._all_published(n_steps)
        ranges = _with_range(self._origin.ranges, self._origin.n_steps, n_steps)
        digest = self._digest(weights, compare=collective)
        # Steps that change no weight (a learning rate of zero) are in the weights as well, or they would pass for those
        # of a run that was given up.
        news = together and (digest, n_steps) != self._last
        if self._trainer.is_global_zero and weights is not None and news:
            travel = tensors_distance(weights.parameters, self.store.initial_weights())
            norm = change_norm(weights.parameters)
            state = ModelState(digest, ranges, self._origin.edits, travel, norm, drifted)
            self.store.add_state(state, self._elsewhere)
            self._last = (digest, n_steps)
        return {
            "store_id": self.store.store_id,
            "n_steps": n_steps,
            "ranges": [list(item) for item in ranges],
            "edits": list(self._origin.edits),
            "digest": digest,
        }

    def _digest(self, weights: WholeWeights | None, *, compare: bool) -> str:
        """The digest of the weights, on rank 0, and only there where they are sharded; empty elsewhere.

        Where every rank has all weights they are compared: each rank records some layers for all, so weights that went
        apart would be recorded wrongly. The others have nothing else to do while rank 0 forms its digest.
        """
        if weights is None or (self._sharded and not self._trainer.is_global_zero):
            return ""
        compare = compare and not self._sharded and self._trainer.world_size > 1
        digest = tensors_digest(weights.parameters) if compare or self._trainer.is_global_zero else ""
        digests = gather(self._trainer.strategy, digest) if compare else [digest]
        apart = next((rank for rank, other in enumerate(digests) if other != digests[0]), None)
        if apart is not None:
            rule = "one whose weights are the same on every process"
            got = f"other weights on rank {apart} than on rank 0"
            remedy = "Parameters unfrozen after DDP was set up are not averaged, for one: unfreeze them before `fit`."
            raise UnsupportedStrategyError(expected("model", rule, got, remedy))
        return digest

    def _all_published(self, n_steps: int) -> bool:
        if self._elsewhere:
            return False
        until = time.monotonic() + _PATIENCE
        while True:
            self.store.refresh()
            if self.store.n_steps >= n_steps or time.monotonic() > until:
                return self.store.n_steps >= n_steps
            time.sleep(_PATIENCE / 100)
