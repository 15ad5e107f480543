"""Appends steps to one rank's part of a store: in constant memory, and without a state that a crash could tear."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor

from lightning_unlearn.exceptions import LightningUnlearnError, UnlearningWarning
from lightning_unlearn.store.anchors import AnchorContents, build_anchor
from lightning_unlearn.store.commits import CommitLog
from lightning_unlearn.store.compression import check_compression
from lightning_unlearn.store.publication import Publication
from lightning_unlearn.store.publisher import Publisher
from lightning_unlearn.store.records import EncodedStep, check_ids
from lightning_unlearn.store.step_encoder import Deltas, PendingStep, StepEncoder
from lightning_unlearn.types import ModelSignature, RecordingSettings, SampleId, StepStatus
from lightning_unlearn.utilities.checks import check_choice, check_positive_int, expected
from lightning_unlearn.utilities.files import Files
from lightning_unlearn.utilities.rng import RngState

__all__ = ["SEGMENT_BYTES", "Background", "StoreWriter"]

Background: TypeAlias = Literal["auto"] | bool
"""What is done beside the training: publication (`"auto"`), encoding as well (`True`), or nothing (`False`)."""

SEGMENT_BYTES = 64 * 2**20
"""Default bound on the bytes of records that a writer collects before it publishes them."""

_QUEUE_DEPTH = 2


class StoreWriter:
    """The only way steps get into a store; one for each rank. Made by `DeltaStore.writer`.

    Records are encoded and held in memory up to `segment_bytes`, then published together as one immutable segment,
    and made part of the store by one commit. What was not flushed is lost in a crash, and nothing else is. Small
    segments are merged behind that, so that their number stays logarithmic however often the writer is flushed.

    Memory: one set of records that is being filled and one that is being published or merged, so at most twice
    `segment_bytes` and one record; with `background=True` also the deltas of two steps that wait to be encoded.

    Args:
        files: The store's directory.
        store_id: The store's id.
        signature: Names and shapes of what is recorded, layers and then pieces of them, by number.
        settings: How values are written.
        rank: The rank whose part is written.
        segment_bytes: Bound on the bytes collected before a publication.
        size_budget: Bound on the bytes of deltas of this rank, or `None`. Once it is reached, later steps are kept
            without their deltas, and a warning says so once.
        background: `"auto"` publishes in a short-lived thread (one publication at a time; the next one waits), so
            that no write or fsync stops the training. `True` encodes in a thread as well, for deltas that are still
            on their way from an accelerator. `False` does everything in `append`. An error of a thread is raised by
            the next call, and nothing is published behind it.

    Raises:
        StoreMismatchError: another writer holds this rank.
        MissingRequirementError: the store is compressed and `zstandard` is missing.
    """

    def __init__(
        self,
        files: Files,
        store_id: str,
        signature: ModelSignature,
        settings: RecordingSettings,
        *,
        rank: int = 0,
        segment_bytes: int = SEGMENT_BYTES,
        size_budget: int | None = None,
        background: Background = "auto",
    ) -> None:
        check_compression(settings.compression)
        check_choice("background", background, ("auto", True, False))
        self._segment_bytes = check_positive_int("segment_bytes", segment_bytes)
        self._size_budget = None if size_budget is None else check_positive_int("size_budget", size_budget, zero=True)
        self._store_id = store_id
        self._encoder = StepEncoder(signature, settings)
        self._log = CommitLog(files, store_id, rank)
        self._publication = Publication(files, store_id, self._log, settings.compression, segment_bytes)
        self._buffer: list[EncodedStep] = []
        self._buffered_bytes = 0
        self._delta_bytes = self._publication.delta_bytes
        self._n_steps = self._log.head.n_steps
        self._warned = False
        self._closed = False
        self._error: BaseException | None = None
        self._publisher = Publisher(threaded=background is not False)
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(_QUEUE_DEPTH)
        self._thread: threading.Thread | None = None
        if background is True:
            self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
            self._thread.start()

    @property
    def n_steps(self) -> int:
        """Number of steps appended so far, published or not: the ordinal of the next one."""
        return self._n_steps

    @property
    def rank(self) -> int:
        """The rank whose part is written."""
        return self._log.rank

    def append(
        self,
        *,
        optimizer: int,
        sample_ids: Sequence[SampleId],
        batch_size: int,
        seconds: float,
        deltas: Deltas | None,
        status: StepStatus = StepStatus.STORED,
        pruning_error: float | Callable[[], float] | None = None,
        edited: bool | Callable[[], bool] = False,
    ) -> int:
        """Append one step.

        Functions in place of values are called where the step is encoded, in the order of the steps.

        Args:
            optimizer: Number of the optimizer that stepped.
            sample_ids: Ids of this rank's samples behind the step, with repeats.
            batch_size: Number of this rank's samples behind the step.
            seconds: Wall time since the previous step.
            deltas: Changes of layers, or `None` where the status says why there are none. With `background=True` they
                are read later, so they must not be changed afterwards.
            status: What happened to the delta.
            pruning_error: Relative L2 error that pruning made, where it was measured; the error of rounding is then
                measured as well.
            edited: Whether something other than an optimizer changed the weights since the step before.

        Returns:
            The step's ordinal.

        Raises:
            ValueError: an argument is out of range, a delta does not fit its layer, or a value is not finite.
            LightningUnlearnError: the writer is closed.
            Exception: what an earlier publication in the background failed with.
        """
        if (deltas is None) == (status is StepStatus.STORED):
            raise ValueError(
                expected("deltas", f"{'given' if deltas is None else 'None'} for this status", status.name)
            )
        pending = PendingStep(
            check_positive_int("optimizer", optimizer, zero=True),
            check_ids(sample_ids),
            check_positive_int("batch_size", batch_size, zero=True),
            float(seconds),
            deltas if callable(deltas) else self._encoder.check(deltas or ()),
            status,
            pruning_error,
            edited,
        )
        self._run(lambda: self._add(pending))
        self._n_steps += 1
        return self._n_steps - 1

    def anchor(
        self,
        weights: Mapping[str, Tensor] | None,
        optimizers: Sequence[Mapping[str, Any]] | None,
        rng: RngState | None,
    ) -> None:
        """Keep the whole state of the training after the steps appended so far, so that it can go on from there.

        What is given is copied before this returns. The anchor becomes part of the store with the commit that holds
        the steps before it. Memory: one copy of the state until that.

        Args:
            weights: Parameters and buffers by name; `None` on ranks whose weights another rank keeps.
            optimizers: What `state_dict()` of every optimizer returned; `None` likewise.
            rng: What `capture_rng` returned.

        Raises:
            TypeError: an optimizer's state holds something else than tensors, numbers, strings and collections.
            Exception: as for `append`.
        """
        contents = build_anchor(self._n_steps, weights, optimizers, rng, store_id=self._store_id, rank=self.rank)
        self._run(lambda: self._submit(contents))

    def flush(self) -> None:
        """Publish everything appended so far; when this returns, it survives a crash."""
        self._run(self._submit)
        self._wait()

    def truncate(self, n_steps: int) -> None:
        """Drop every step from `n_steps` on, and every anchor whose weights contain one, in one commit.

        Raises:
            ValueError: there are fewer steps.
        """
        if check_positive_int("n_steps", n_steps, zero=True) > self._n_steps:
            raise ValueError(expected("n_steps", f"at most the {self._n_steps} steps there are", n_steps))
        self._run(lambda: self._truncate(n_steps))
        self._wait()
        self._n_steps = n_steps

    def close(self) -> None:
        """Flush and give the store back; a second call does nothing. The writer is closed even where it raises."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Give the store back without what was not flushed; for use after an error."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        self._publisher.settle()
        self._log.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _run(self, task: Callable[[], None]) -> None:
        if self._closed:
            raise LightningUnlearnError(expected("writer", "open", "a closed one", "Open another one."))
        self._raise_error()
        if self._thread is None:
            task()
        else:
            self._queue.put(task)

    def _wait(self) -> None:
        if self._thread is not None:
            self._queue.join()
        self._publisher.settle()
        self._raise_error()

    def _raise_error(self) -> None:
        self._publisher.check()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        torch.set_num_threads(1)  # holds for this thread only
        while True:
            task = self._queue.get()
            try:
                if task is None:
                    return
                if self._error is None:
                    task()
            except BaseException as error:
                self._error = error
            finally:
                self._queue.task_done()

    def _add(self, pending: PendingStep) -> None:
        step = self._encoder.encode(pending)
        if self._size_budget is not None and step.payload and self._delta_bytes + len(step.payload) > self._size_budget:
            step = self._encoder.without_delta(pending, StepStatus.OVER_BUDGET, step.edited)
            self._delta_bytes = max(self._delta_bytes, self._size_budget)  # a later, smaller step is not let in
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"The deltas have reached the size budget of {self._size_budget} bytes: steps are recorded "
                    "without their deltas from here on, so samples in them cannot be forgotten by subtraction.",
                    UnlearningWarning,
                    stacklevel=4,
                )
        self._buffer.append(step)
        self._delta_bytes += len(step.payload)
        self._buffered_bytes += len(step.payload) + step.entries.nbytes + 16 * len(step.sample_ids) + 64
        if self._buffered_bytes >= self._segment_bytes:
            self._submit()

    def _taken(self) -> list[EncodedStep]:
        steps, self._buffer, self._buffered_bytes = self._buffer, [], 0
        return steps

    def _submit(self, anchor: AnchorContents | None = None) -> None:
        """Hand what was collected over; waits for the publication before it, so that only two sets are in memory."""
        if not self._buffer and anchor is None:
            return
        steps = self._taken()
        self._publisher.submit(lambda: self._publication.publish(steps, anchor))

    def _truncate(self, n_steps: int) -> None:
        self._publisher.wait()  # only now is it known what is published and what is not
        steps = self._taken()
        del steps[max(0, n_steps - self._log.head.n_steps) :]
        self._publisher.run(lambda: self._publication.truncate(steps, n_steps))
        self._delta_bytes = self._publication.delta_bytes
