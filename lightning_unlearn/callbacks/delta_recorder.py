"""Records what every optimizer step did to the weights, and which samples were behind it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Self
from warnings import warn

from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_unlearn.callbacks.delta_capture import DeltaCapture
from lightning_unlearn.callbacks.recording_checks import (
    DEFAULT_KEEP,
    check_optimizers,
    check_strategy,
    check_watch,
    keep_settings,
)
from lightning_unlearn.callbacks.recording_session import RecordingSession
from lightning_unlearn.data.positions import as_sample_id
from lightning_unlearn.data.sample_ids import BatchIdentity, SampleKeys
from lightning_unlearn.exceptions import (
    StoreMismatchError,
    UnlearningWarning,
)
from lightning_unlearn.store.compression import check_compression
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.lineage import RunKind
from lightning_unlearn.types import RecordingSettings, SampleId, StepStatus, ValueDtype
from lightning_unlearn.utilities.checks import check_choice, check_positive_int, expected, shorten

__all__ = ["DeltaRecorder"]


class DeltaRecorder(Callback):
    """Add it to an existing Trainer, and nothing else changes: the trained weights are bitwise the same.

    After every optimizer step it takes after - before of every parameter that the optimizer holds, keeps the entries
    of largest magnitude of each layer (exactly `ceil(keep * numel)` of them; zeros are never stored), and appends
    them to a store, together with the ids of the samples behind the step, the batch size and the seconds. Steps that
    a gradient scaler skips are not steps. With accumulation one step holds the ids of several batches; with several
    optimizers each step holds those since the same optimizer's previous step. Under data parallelism every rank
    stores its own ids and its share of the layers.

    With `keep=1.0` and `value_dtype="float32"`, initial weights + all deltas = final weights up to float32 rounding
    (1e-7 of the largest weight). Amnesiac unlearning by recorded updates is due to Graves, Nagisetty and Ganesh
    (2021), "Amnesiac Machine Learning" (arXiv:2010.10981).

    A `fast_dev_run` records nothing, as it saves no checkpoint; sample ids are looked up all the same.

    A change of weights made by anything but an optimizer (clamping, weight averaging) is charged to the next step; one
    after the last step is not in the store, and a warning says so.

    Args:
        store: Directory (or fsspec URL) of the store. A new one is created; an existing one must know the weights
            that training starts from, and is continued.
        keep: Fraction of every layer to keep, in (0, 1], or patterns of layer names (`fnmatch`, first match wins) ->
            fractions; a final `"*"` stands for all other layers, which otherwise keep 0.1.
        criterion: `"magnitude"`, or `"random"` as a control.
        scope: `"layer"`, or `"global"`: one threshold over all layers of a step.
        value_dtype: How values are written; `"scaled_float16"` has a scale per layer.
        compression: `"zstd"` or `None`.
        sample_id: Key of the batch that holds its ids, or a function of the batch. By default an id is the position
            in the underlying dataset.
        sample_keys: Position -> stable key, such as a user id; the recommended identity.
        data_digest: A hash of the data; a later run with another hash is refused.
        watch: Store deltas only of steps whose batch holds one of these ids. Ids, batch size and seconds are stored
            for every step.
        buffers: `"record"` also stores changes of float buffers (BatchNorm's running statistics), in full.
        size_budget: Bound on the bytes of deltas, after which steps are stored without their delta.
        background: Encode and write in a thread; worth it with an accelerator or spare cores.
        seed: For `criterion="random"`.
        kind: `"repair"` for training after an edit.

    Raises:
        ValueError: an argument is out of range.
        UnsupportedStrategyError: in `fit`, before training: a strategy other than a single device or DDP, an optimizer
            without step hooks, or data whose samples cannot be identified.
        StoreMismatchError: in `fit`, before training: the store is of another model, other data, or another run, or
            the checkpoint that is resumed was not written while recording into it.

    A module that wraps the one to be recorded names it by an attribute `recorded_module`.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        keep: float | Mapping[str, float] = DEFAULT_KEEP,
        *,
        criterion: Literal["magnitude", "random"] = "magnitude",
        scope: Literal["layer", "global"] = "layer",
        value_dtype: ValueDtype = "scaled_float16",
        compression: Literal["zstd"] | None = None,
        sample_id: str | Callable[[Any], Sequence[SampleId]] | None = None,
        sample_keys: SampleKeys | None = None,
        data_digest: str | None = None,
        watch: Collection[SampleId] | None = None,
        buffers: Literal["ignore", "record"] = "ignore",
        size_budget: int | None = None,
        background: bool = False,
        seed: int = 0,
        kind: RunKind = "fit",
    ) -> None:
        super().__init__()
        fraction, overrides = keep_settings(keep, check_choice("scope", scope, ("layer", "global")))
        self._settings = RecordingSettings(
            keep=fraction,
            keep_overrides=overrides,
            criterion=check_choice("criterion", criterion, ("magnitude", "random")),
            scope=scope,
            value_dtype=check_choice("value_dtype", value_dtype, ("float32", "bfloat16", "scaled_float16")),
            compression=check_choice("compression", compression, (None, "zstd")),
            watched=watch is not None,
            buffers=check_choice("buffers", buffers, ("ignore", "record")),
        )
        check_compression(compression)
        if watch is not None and (isinstance(watch, str | bytes) or not len(watch)):
            raise ValueError(expected("watch", "a non-empty collection of sample ids, or None", watch))
        self._url = os.fspath(store)
        self._watch = None if watch is None else frozenset(as_sample_id("watch", one) for one in watch)
        self._size_budget = None if size_budget is None else check_positive_int("size_budget", size_budget)
        self._background = bool(background)
        self._seed = check_positive_int("seed", seed, zero=True)
        self._kind: RunKind = check_choice("kind", kind, ("fit", "repair"))
        self._identity = BatchIdentity(sample_id, sample_keys, digest=data_digest)
        self._handles: list[RemovableHandle] = []
        self._session: RecordingSession | None = None
        self._capture: DeltaCapture | None = None
        self._module: nn.Module | None = None
        self._trainer: Trainer | None = None
        self._pending: list[list[SampleId]] = []
        self._current: list[SampleId] = []
        self._last_step = 0.0
        self._saved: dict[str, Any] = {}
        self._resume: dict[str, Any] | None = None
        self._foreign = False
        self._failed = False
        self._warned = False

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
        """What is recorded and how."""
        return self._settings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy that cannot be recorded correctly, and listen to the training loaders.

        Not later: a module that asks for `trainer.estimated_stepping_batches` in `configure_optimizers` makes the
        Trainer build its loaders between `setup` and `on_fit_start`.
        """
        if stage != "fit":
            return
        self._uninstall()
        self._resume, self._foreign = None, False  # of a fit that failed before it started to train
        check_strategy(trainer.strategy)
        self._identity.install(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notice a checkpoint that was not written while recording."""
        self._foreign = not checkpoint.get("callbacks", {}).get(self.state_key)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where the recording stood as the checkpoint was written."""
        self._resume = dict(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store and start recording; every check is made before anything is written."""
        resume, foreign = self._resume, self._foreign
        self._resume, self._foreign = None, False
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if foreign:
            remedy = "Steps before it are not in a store: resume without the recorder, or train from the start."
            raise StoreMismatchError(
                expected("ckpt_path", "a checkpoint written while recording", "one without a recording", remedy)
            )
        module = self._module = getattr(pl_module, "recorded_module", pl_module)
        check_watch(self._watch, self._identity.known_ids)
        check_optimizers(trainer.optimizers)
        capture = self._capture = DeltaCapture(
            module,
            self._settings,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            seed=self._seed,
            share=not self._background,
        )
        complete = [capture.watch(optimizer) for optimizer in trainer.optimizers]
        self._session = RecordingSession.open(
            trainer,
            module,
            self._url,
            settings=self._settings,
            data=self._identity.fingerprint,
            optimizers=trainer.optimizers,
            kind=self._kind,
            resume=resume,
            size_budget=self._size_budget,
            background=self._background,
        )
        if not all(complete):
            warn(
                "The optimizer also holds parameters that are not part of the module: they are not recorded, so what "
                "they learned cannot be forgotten by subtraction.",
                UnlearningWarning,
                stacklevel=2,
            )
        self._trainer, self._failed, self._warned, self._saved = trainer, False, False, {}
        self._pending, self._current = [[] for _ in trainer.optimizers], []
        self._last_step = time.perf_counter()
        for number, optimizer in enumerate(trainer.optimizers):
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step(number)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note who is in the batch."""
        self._current = self._identity.batch_ids(batch)
        for pending in self._pending:
            pending.extend(self._current)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the weights known, also for checkpoints that hold nothing else."""
        self._identity.end_epoch()
        self._save_state()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the last steps and make the final weights known."""
        self._save_state()

    def state_dict(self) -> dict[str, Any]:
        """Publish what was recorded so far; a run resumed from this checkpoint continues exactly here."""
        self._save_state()
        return dict(self._saved)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Publish what is sound, and leave nothing behind."""
        try:
            # Other ranks may not get here, so nothing waits for them.
            self._save_state(collective=False)
        finally:
            self._uninstall()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give back the store, the loaders and the optimizers."""
        if stage == "fit":
            self._uninstall()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._capture is not None:
            self._capture.watch(optimizer)

    def _after_step(self, number: int) -> Callable[[Optimizer, Any, Any], None]:
        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            try:
                self._record(number, optimizer)
            except BaseException:
                # The weights have moved and the store has not: nothing may claim that they belong together.
                self._failed = True
                raise

        return hook

    def _record(self, number: int, optimizer: Optimizer) -> None:
        session, capture, trainer = self._session, self._capture, self._trainer
        if session is None or capture is None or trainer is None:
            return
        # A second step on the same batch belongs to that batch as well.
        ids, self._pending[number] = self._pending[number] or self._current, []
        now = time.perf_counter()
        seconds, self._last_step = now - self._last_step, now
        deltas, status = None, StepStatus.UNWATCHED
        watched = self._watch is None or not self._watch.isdisjoint(ids)
        if self._watch is not None:
            watched = trainer.strategy.reduce_boolean_decision(watched, all=False)
        if watched:
            deltas, status = capture.changes(optimizer, session.writer.n_steps), StepStatus.STORED
        else:
            capture.skip(optimizer)
        session.writer.append(
            optimizer=number, sample_ids=ids, batch_size=len(ids), seconds=seconds, deltas=deltas, status=status
        )

    def _save_state(self, *, collective: bool = True) -> None:
        session, capture, module = self._session, self._capture, self._module
        if session is None or capture is None or module is None:
            return
        if self._failed:
            self._saved = {}
            return
        drifted = capture.drifted()
        if drifted and not self._warned:
            self._warned = True
            warn(
                f"Something other than an optimizer changed {shorten(drifted)} after the last step (weight averaging, "
                "or an edit in a hook): that change is not recorded, and subtraction will not undo it.",
                UnlearningWarning,
                stacklevel=3,
            )
        try:
            self._saved = session.state(module, collective=collective)
        except BaseException:
            self._failed, self._saved = True, {}
            raise

    def _uninstall(self) -> None:
        self._identity.uninstall()
        for handle in self._handles:
            handle.remove()
        session, self._session = self._session, None
        self._handles, self._capture, self._module, self._trainer = [], None, None, None
        self._pending, self._current = [], []
        if session is not None:
            session.writer.abandon()
