"""Records what every optimizer step did to the weights, and which samples were behind it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, Self, get_args

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_unlearn.callbacks.delta_capture import DeltaCapture
from lightning_unlearn.callbacks.published_note import published_note
from lightning_unlearn.callbacks.recording_checks import (
    check_anchors,
    check_dtypes,
    check_optimizers,
    check_resumable,
    check_strategy,
    check_watch,
    warn_of_others,
)
from lightning_unlearn.callbacks.recording_layout import has_own_samples, held_parts, layout_of
from lightning_unlearn.callbacks.recording_session import RecordingSession
from lightning_unlearn.callbacks.recording_settings import RequestedSettings, trainable_share
from lightning_unlearn.callbacks.run_origin import recorded_settings
from lightning_unlearn.callbacks.shard_reductions import GroupReductions
from lightning_unlearn.callbacks.signals_at_batch_end import nothing_to_take_back, put_off_signals
from lightning_unlearn.callbacks.step_recording import StepRecording
from lightning_unlearn.data.positions import as_sample_id
from lightning_unlearn.data.sample_ids import BatchIdentity, SampleKeys
from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.store.compression import check_compression
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.lineage import RunKind
from lightning_unlearn.types import RecordingSettings, SampleId, ValueDtype
from lightning_unlearn.utilities.checks import check_choice, check_positive_int, expected
from lightning_unlearn.utilities.distributed import on_rank_zero
from lightning_unlearn.utilities.parameters import gathered_weights
from lightning_unlearn.utilities.whole_weights import WholeWeights, is_sharded

__all__ = ["DeltaRecorder"]


class DeltaRecorder(Callback):
    """Add it to an existing Trainer, and nothing else changes: the trained weights are bitwise the same.

    After every optimizer step it takes after - before of every parameter that the optimizer holds, keeps the entries
    of largest magnitude of each layer (exactly `ceil(keep * numel)` of them; zeros are never stored), and appends
    them to a store, together with the ids of the samples behind the step, the batch size and the seconds. Steps that
    a gradient scaler skips are not steps. With accumulation one step holds the ids of several batches; with several
    optimizers each step holds those since the same optimizer's previous step. Under DDP every rank stores
    its own ids and its share of the layers; where parameters are sharded, the piece of each layer that it holds, of
    which the same entries are kept as one process would keep.

    With `keep=1.0` and `value_dtype="float32"`, initial weights + all deltas = final weights up to float32 rounding
    (1e-7 of the largest weight). Amnesiac unlearning by recorded updates is due to Graves, Nagisetty and Ganesh
    (2021), "Amnesiac Machine Learning" (arXiv:2010.10981).

    A `fast_dev_run` records nothing, as it saves no checkpoint; sample ids are looked up all the same.

    A change of weights made by anything but an optimizer (clamping, weight averaging) is in no recorded step: a warning
    says so once, the step that follows is marked, and plans count them.

    Args:
        store: Directory (or fsspec URL) of the store. A new one is created; an existing one must know the weights
            that training starts from, and is continued. With a path that is local to each node the ranks of every
            node but rank 0's record into a part of the store, to be brought there by `DeltaStore.join`.
        keep: Fraction of every layer to keep, in (0, 1], or patterns of layer names (`fnmatch`, first match wins) ->
            fractions; a final `"*"` stands for all other layers, which otherwise keep 0.1. Left open it is 0.1, or 1.0
            where less than 5 % of the parameters are trainable (adapters such as LoRA).
        criterion: `"magnitude"`, or `"random"` as a control.
        scope: `"layer"`, or `"global"`: one threshold over all layers of a step.
        value_dtype: How values are written; `"scaled_float16"` has a scale per layer. Left open it is that, or
            `"float32"` where less than 5 % of the parameters are trainable.
        compression: `"zstd"` or `None`.
        sample_id: Key of the batch that holds its ids, or a function of the batch. By default an id is the position
            in the underlying dataset.
        sample_keys: Position -> stable key, such as a user id; the recommended identity.
        data_digest: A hash of the data; a later run with another hash is refused.
        watch: Store deltas only of steps whose batch holds one of these ids. Ids, batch size and seconds are stored
            for every step.
        buffers: `"record"` also stores changes of float buffers (BatchNorm's running statistics), in full.
        size_budget: Bound on the bytes of deltas, after which steps are stored without their delta.
        background: `True` encodes and writes in a thread, `False` does both in the training's own; `"auto"` writes in
            a thread, and encodes in one where the weights are on an accelerator.
        anchor_every: Keep the whole state of the training (weights, optimizers, random numbers) after every so many
            recorded steps, to go on from there: `DeltaStore.read_anchor`. It takes the space of a checkpoint.
        seed: For `criterion="random"`.
        kind: `"repair"` for training after an edit.

    Raises:
        ValueError: an argument is out of range.
        UnsupportedStrategyError: in `fit`, before training: a strategy other than a single device, DDP or FSDP,
            anchors of shards, an optimizer without step hooks, or data whose samples cannot be identified. Under DDP
            also during it: weights that went apart.
        StoreMismatchError: in `fit`, before training: the store is of another model, other data, or another run, or
            the checkpoint that is resumed was not written while recording into it.

    A module that wraps the one to be recorded names it by an attribute `recorded_module`.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        keep: float | Mapping[str, float] | None = None,
        *,
        criterion: Literal["magnitude", "random"] = "magnitude",
        scope: Literal["layer", "global"] = "layer",
        value_dtype: ValueDtype | None = None,
        compression: Literal["zstd"] | None = None,
        sample_id: str | Callable[[Any], Sequence[SampleId]] | None = None,
        sample_keys: SampleKeys | None = None,
        data_digest: str | None = None,
        watch: Collection[SampleId] | None = None,
        buffers: Literal["ignore", "record"] = "ignore",
        size_budget: int | None = None,
        background: Literal["auto"] | bool = "auto",
        anchor_every: int | None = None,
        seed: int = 0,
        kind: RunKind = "fit",
    ) -> None:
        super().__init__()
        self._requested = RequestedSettings.of(
            keep,
            None if value_dtype is None else check_choice("value_dtype", value_dtype, get_args(ValueDtype)),
            scope=check_choice("scope", scope, ("layer", "global")),
            criterion=check_choice("criterion", criterion, ("magnitude", "random")),
            compression=check_choice("compression", compression, (None, "zstd")),
            watched=watch is not None,
            buffers=check_choice("buffers", buffers, ("ignore", "record")),
        )
        self._settings = self._requested.base
        check_compression(compression)
        if watch is not None and (isinstance(watch, str | bytes) or not len(watch)):
            raise ValueError(expected("watch", "a non-empty collection of sample ids, or None", watch))
        self._url = os.fspath(store)
        self._watch = None if watch is None else frozenset(as_sample_id("watch", one) for one in watch)
        self._size_budget = None if size_budget is None else check_positive_int("size_budget", size_budget)
        self._background: Literal["auto"] | bool = check_choice("background", background, ("auto", True, False))
        self._anchor_every = None if anchor_every is None else check_positive_int("anchor_every", anchor_every)
        self._seed = check_positive_int("seed", seed, zero=True)
        self._kind: RunKind = check_choice("kind", kind, ("fit", "repair"))
        self._identity = BatchIdentity(sample_id, sample_keys, digest=data_digest)
        self._recording: StepRecording | None = None
        self._saved: dict[str, Any] = {}
        self._resume: dict[str, Any] | None = None
        self._foreign = False
        self._checkpointed: int | None = None  # steps in the newest checkpoint
        self._take_signals_back: Callable[[], None] = nothing_to_take_back

    @classmethod
    def like(
        cls,
        store: DeltaStore,
        *,
        kind: RunKind = "fit",
        sample_id: str | Callable[[Any], Sequence[SampleId]] | None = None,
        sample_keys: SampleKeys | None = None,
        **kwargs: Any,
    ) -> Self:
        """A recorder that continues `store` with its own settings; `kwargs` are those that a store does not fix."""
        settings = store.settings
        keep = {**settings.keep_overrides, "*": settings.keep} if settings.keep_overrides else settings.keep
        return cls(
            store.url,
            keep,
            criterion=settings.criterion,
            scope=settings.scope,
            value_dtype=settings.value_dtype,
            compression=settings.compression,
            buffers=settings.buffers,
            data_digest=store.data.digest,
            sample_id=sample_id,
            sample_keys=sample_keys,
            kind=kind,
            **kwargs,
        )

    @property
    def settings(self) -> RecordingSettings:
        """What is recorded and how; where that was left open, what it is in the current or latest fit."""
        return self._settings

    @property
    def store(self) -> DeltaStore | None:
        """The store that is recorded into, while a fit is under way."""
        return None if self._recording is None else self._recording.store

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy that cannot be recorded correctly, and listen to the training loaders.

        Not later: a module that asks for `trainer.estimated_stepping_batches` in `configure_optimizers` makes the
        Trainer build its loaders between `setup` and `on_fit_start`.
        """
        if stage != "fit":
            return
        self._uninstall()
        self._resume, self._foreign = None, False  # of a fit that failed before it started to train
        self._checkpointed = None
        check_strategy(trainer.strategy)
        self._identity.install(trainer)
        self._take_signals_back = put_off_signals(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notice a checkpoint that was not written while recording."""
        self._foreign = not checkpoint.get("callbacks", {}).get(self.state_key)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where the recording stood as the checkpoint was written."""
        self._resume = dict(state_dict)
        self._checkpointed = int(state_dict["n_steps"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store and start recording; every check is made before anything is written."""
        resume, foreign = self._resume, self._foreign
        self._resume, self._foreign = None, False
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        check_resumable(foreign)
        module = getattr(pl_module, "recorded_module", pl_module)
        check_watch(self._watch, self._identity.known_ids)
        check_optimizers(trainer.optimizers)
        weights = gathered_weights(module)
        check_dtypes(weights.parameters, weights.trainable)
        check_anchors(self._anchor_every, is_sharded(module))
        warn_of_others(trainer.optimizers, module)
        self._settings = self._settle(trainer, weights)
        away = any(parameter.device.type != "cpu" for parameter in module.parameters())
        background = True if away and self._background == "auto" else self._background
        layout = layout_of(
            held_parts(module, weights),
            trainer.global_rank,
            trainer.world_size,
            sharded=is_sharded(module) and trainer.world_size > 1,
            one_place=self._settings.scope == "global",
        )
        session = RecordingSession.open(
            trainer,
            module,
            self._url,
            weights=weights,
            pieces=layout.pieces,
            settings=self._settings,
            data=self._identity.fingerprint,
            optimizers=trainer.optimizers,
            kind=self._kind,
            resume=resume,
            size_budget=self._size_budget,
            background=background,
        )
        try:
            capture = DeltaCapture(
                module,
                self._settings,
                rank=trainer.global_rank,
                seed=self._seed,
                share=background is not True,
                layout=layout,
                names=list(weights.parameters),
                first_piece=session.first_piece,
                reductions=GroupReductions(trainer.strategy.root_device),
            )
            for optimizer in trainer.optimizers:
                capture.watch(optimizer)
        except BaseException:
            session.writer.abandon()
            raise
        self._saved = {}
        self._recording = StepRecording(
            trainer,
            module,
            capture,
            session,
            self._identity,
            watch=self._watch,
            anchor_every=self._anchor_every,
            own_samples=has_own_samples(trainer.strategy),
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note who is in the batch."""
        if self._recording is not None:
            self._recording.note_batch(batch)
        elif not self._identity.fetches_itself:
            self._identity.batch_ids(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the weights known, also for checkpoints that hold nothing else."""
        if self._recording is None:
            self._identity.end_epoch()
        else:
            self._recording.end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the last steps and make the final weights known."""
        if self._recording is not None:
            self._recording.save_state()

    def state_dict(self) -> dict[str, Any]:
        """Publish what was recorded so far; a run resumed from this checkpoint continues exactly here."""
        if self._recording is not None:
            self._recording.save_state()
            self._saved = self._recording.saved
            self._checkpointed = self._saved.get("n_steps", self._checkpointed)
        elif self._resume is not None:
            return dict(self._resume)  # nothing was trained since the checkpoint that is being resumed
        return dict(self._saved)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Publish what is sound, and leave nothing behind."""
        try:
            # Other ranks may not get here, so nothing waits for them.
            if self._recording is not None:
                self._recording.save_state(collective=False)
                with suppress(LightningUnlearnError, OSError):  # the error that is being handled says more
                    store, rank, world_size = self._recording.store, trainer.global_rank, trainer.world_size
                    exception.add_note(published_note(store, rank, world_size, self._checkpointed))
        finally:
            self._uninstall()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give back the store, the loaders and the optimizers."""
        if stage == "fit":
            self._uninstall()

    def _settle(self, trainer: Trainer, weights: WholeWeights) -> RecordingSettings:
        if not self._requested.is_open:
            return self._requested.base
        share = trainable_share(weights.parameters, weights.trainable)
        settings = self._requested.resolve(
            share, on_rank_zero(trainer.strategy, lambda: recorded_settings(self._url, weights))
        )
        rank_zero_info(
            f"DeltaRecorder keeps {settings.keep:.0%} of each layer as {settings.value_dtype}: {share:.1%} of the "
            "parameters are trainable. Pass `keep` and `value_dtype` to choose otherwise."
        )
        return settings

    def _uninstall(self) -> None:
        self._identity.uninstall()
        take_back, self._take_signals_back = self._take_signals_back, nothing_to_take_back
        take_back()
        recording, self._recording = self._recording, None
        if recording is not None:
            self._saved = recording.saved
            recording.close()
