"""One fit under way: what happens between the first and the last optimizer step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any
from warnings import warn

from lightning import Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_unlearn.callbacks.before_change import look_before_change
from lightning_unlearn.callbacks.checkpoint_tap import listen_to_checkpoints
from lightning_unlearn.callbacks.delta_capture import DeltaCapture, StepChange
from lightning_unlearn.callbacks.pending_ids import PendingIds
from lightning_unlearn.callbacks.recording_session import RecordingSession
from lightning_unlearn.data.sample_ids import BatchIdentity
from lightning_unlearn.exceptions import (
    LightningUnlearnError,
    MissingRequirementError,
    UnlearningWarning,
    UnsupportedStrategyError,
)
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import SampleId, StepStatus
from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.parameters import tensors_digest

__all__ = ["StepRecording"]

# Of every optimizer's own steps, or of two that take turns one would never be measured; and not the first, in which
# Adam changes all weights by the same amount, so that pruning loses most and rounding nothing.
_MEASURE_EVERY, _MEASURE_FROM = 100, 10


class StepRecording:
    """Listens to the optimizers of one fit, and appends each of their steps to the store.

    Made once everything has been checked and the store is open; `close` gives everything back.

    Args:
        trainer: The Trainer.
        module: The module that is recorded.
        capture: What a step changed.
        session: Where it goes.
        identity: Who was in the batches.
        watch: Ids whose steps are stored with their delta; `None` for all steps.
        anchor_every: After how many recorded steps the whole state of the training is kept; `None` for never.
        own_samples: Whether the samples of this process are to be recorded, or another one records the same.

    Attributes:
        saved: `RecordingSession.state` as of the last `save_state`; empty after a step could not be recorded.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: nn.Module,
        capture: DeltaCapture,
        session: RecordingSession,
        identity: BatchIdentity,
        *,
        watch: Collection[SampleId] | None,
        anchor_every: int | None = None,
        own_samples: bool = True,
    ) -> None:
        self.saved: dict[str, Any] = {}
        self._trainer = trainer
        self._module = module
        self._capture = capture
        self._session = session
        self._identity = identity
        self._watch = None if watch is None else frozenset(watch)
        self._anchor_every = anchor_every
        self._own_samples = own_samples
        self._pending = PendingIds(len(trainer.optimizers))
        self._edited_late: int | None = None
        self._taken = [0] * len(trainer.optimizers)
        self._under_way = [0] * len(trainer.optimizers)
        self._changing = False  # from the moment a step changes weights until it is recorded
        # The session looks after the others, which are most of the model where there are any.
        untouched = {name: value for name, value in capture.untouched().items() if name not in session.store.frozen}
        self._still = {name: tensors_digest({name: value}) for name, value in untouched.items()}
        self._failed = False
        self._warned = False
        self._last_step = time.perf_counter()
        self._stop_listening: list[Callable[[], None]] = []
        for number, optimizer in enumerate(trainer.optimizers):
            self._stop_listening.append(optimizer.register_step_pre_hook(self._before_step(number)).remove)
            self._stop_listening.append(optimizer.register_step_post_hook(self._after_step(number)).remove)
        self._stop_listening.append(listen_to_checkpoints(trainer.strategy, self._before_checkpoint))

    @property
    def store(self) -> DeltaStore:
        """The store that is recorded into."""
        return self._session.store

    def note_batch(self, batch: Any) -> None:
        """A batch is about to be trained on, or a step begins that fetches its batches itself."""
        self._under_way = [0] * len(self._under_way)  # none is, even where somebody has caught a step's error
        self._changing = False
        if self._identity.fetches_itself:
            try:
                self._identity.begin_step()
            except UnsupportedStrategyError:
                self._failed = True  # what was recorded so far names the wrong samples
                raise
        else:
            self._pending.add(self._identity.batch_ids(batch))

    def end_epoch(self) -> None:
        """An epoch is over: make its weights known, also for checkpoints that hold nothing else."""
        self._hear_fetched()
        self._identity.end_epoch()
        self.save_state()

    def save_state(self, *, collective: bool = True) -> None:
        """Publish what was recorded so far and make the weights at hand known; see `RecordingSession.state`.

        Raises:
            LightningUnlearnError: an optimizer step is under way, as a signal's handler may find it.
        """
        if self._changing and collective:
            rule, got = "saved between two optimizer steps", "one in the middle of a step"
            remedy = "Save at the end of a batch; `SignalsAtBatchEnd` puts off to it what Lightning does on a signal."
            raise LightningUnlearnError(expected("checkpoint", rule, got, remedy))
        if self._failed or self._changing:
            self.saved = {}
            if not self._failed:
                self._session.writer.flush()  # the steps before are sound, the weights at hand are of none
            return
        weights = self._session.weights(collective=collective)
        drifted = [*self._capture.drifted(), *self._moved(), *self._session.moved(weights)]
        self._say_edited(drifted)
        try:
            self.saved = self._session.state(weights, drifted=bool(drifted), collective=collective)
            self._say_edited(())
        except BaseException:
            self._failed, self.saved = True, {}
            raise

    def close(self) -> None:
        """Leave optimizers, strategy and store as they were; what was not published is given up."""
        for stop in self._stop_listening:
            stop()
        # They refer to this object: without that, the copy of the weights would wait for the garbage collector.
        self._stop_listening = []
        self._session.writer.abandon()

    def _moved(self) -> list[str]:
        """Parameters that no optimizer has, and that are not what they were: a teacher that follows by averaging."""
        held = self._capture.untouched()
        return [
            name
            for name, digest in self._still.items()
            if name in held and tensors_digest({name: held[name]}) != digest
        ]

    def _before_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        # A checkpoint with callbacks in it has asked for the recorder's state already.
        if "callbacks" not in checkpoint:
            self.save_state()

    def _before_step(self, number: int) -> Callable[[Optimizer, Any, Any], Any]:
        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            def look() -> None:
                self._changing = True
                self._session.about_to_train(optimizer)
                self._say_edited(self._capture.watch(optimizer).edited)

            # Torch calls hooks once more where a step calls that of its base class: it is one step all the same.
            self._under_way[number] += 1
            if self._under_way[number] > 1:
                return None
            self._session.about_to_train(optimizer)
            self._capture.meet(optimizer)
            return look_before_change(optimizer, args, kwargs, look)

        return hook

    def _say_edited(self, names: Sequence[str]) -> None:
        late = self._edited_late
        if (names or late is not None) and not self._warned:
            self._warned = True
            what, step = (shorten(names), self._session.writer.n_steps) if names else ("weights", late)
            warn(
                f"Something other than an optimizer changed {what} after step {step} "
                "(weight averaging, clamping, or an edit in a hook): such changes are in no recorded step, and "
                "subtraction will not undo them. Steps that follow one are marked in the store.",
                UnlearningWarning,
                stacklevel=3,
            )

    def _noted(self, edited: bool | Callable[[], bool], step: int) -> bool | Callable[[], bool]:
        if not callable(edited):
            return edited

        def ask() -> bool:
            # The writer's thread is the first to know of an edit on an accelerator; it is said on the training's.
            found = edited()
            if found and self._edited_late is None:
                self._edited_late = step
            return found

        return ask

    def _after_step(self, number: int) -> Callable[[Optimizer, Any, Any], None]:
        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._under_way[number] -= 1
            if self._under_way[number] > 0:
                return
            try:
                self._record(number, optimizer)
                self._changing = False
            except BaseException:
                # The weights have moved and the store has not: nothing may claim that they belong together.
                self._failed = True
                raise

        return hook

    def _hear_fetched(self) -> None:
        if self._identity.fetches_itself:
            ids = self._identity.delivered_ids()
            if ids:
                self._pending.add(ids)

    def _record(self, number: int, optimizer: Optimizer) -> None:
        self._hear_fetched()
        ids = self._pending.take(number)
        if not ids:
            rule = "one that trains on batches it was given, or fetched from `dataloader_iter`"
            raise MissingRequirementError(
                expected("training_step", rule, "a step on no batch of the Trainer's loaders")
            )
        now = time.perf_counter()
        seconds, self._last_step = now - self._last_step, now
        step = self._session.writer.n_steps
        change: StepChange | None = None
        if self._is_watched(ids):
            taken, self._taken[number] = self._taken[number], self._taken[number] + 1
            change = self._capture.changes(optimizer, step, taken % _MEASURE_EVERY == _MEASURE_FROM)
            edited = change.edited
        else:
            edited = self._capture.skip(optimizer, step)
        self._session.writer.append(
            optimizer=number,
            sample_ids=ids if self._own_samples else (),
            batch_size=len(ids) if self._own_samples else 0,
            seconds=seconds,
            deltas=None if change is None else change.deltas,
            status=StepStatus.UNWATCHED if change is None else StepStatus.STORED,
            pruning_error=None if change is None else change.pruning_error,
            edited=self._noted(edited, step),
        )
        if self._anchor_every is not None and (step + 1) % self._anchor_every == 0:
            self._session.anchor(self._module, self._trainer.optimizers)

    def _is_watched(self, ids: Collection[SampleId]) -> bool:
        if self._watch is None:
            return True
        return self._trainer.strategy.reduce_boolean_decision(not self._watch.isdisjoint(ids), all=False)
