"""Appends steps to one rank's part of a store: in constant memory, and without a state that a crash could tear."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from lightning_unlearn.exceptions import LightningUnlearnError, UnlearningWarning
from lightning_unlearn.store.codec import EncodedLayer, encode_layer
from lightning_unlearn.store.commits import CommitLog
from lightning_unlearn.store.compression import check_compression
from lightning_unlearn.store.records import EncodedStep, check_ids, encode_step
from lightning_unlearn.store.rewrite import slice_segment
from lightning_unlearn.store.segment import build_segment
from lightning_unlearn.types import LayerDelta, ModelSignature, RecordingSettings, SampleId, StepStatus
from lightning_unlearn.utilities.checks import check_positive_int, expected
from lightning_unlearn.utilities.files import Files

__all__ = ["SEGMENT_BYTES", "StoreWriter"]

SEGMENT_BYTES = 64 * 2**20
"""Default bound on what a writer holds in memory before it publishes."""

_QUEUE_DEPTH = 2


@dataclass(frozen=True, slots=True)
class _Pending:
    optimizer: int
    sample_ids: tuple[SampleId, ...]
    batch_size: int
    seconds: float
    deltas: tuple[LayerDelta, ...]
    status: StepStatus


class StoreWriter:
    """The only way steps get into a store; one for each rank. Made by `DeltaStore.writer`.

    Records are encoded and held in memory up to `segment_bytes`, then published together as one immutable segment,
    and made part of the store by one commit. What was not flushed is lost in a crash, and nothing else is.

    Args:
        files: The store's directory.
        store_id: The store's id.
        signature: Names and shapes of the recorded layers.
        settings: How values are written.
        rank: The rank whose part is written.
        segment_bytes: Bound on the bytes held in memory.
        size_budget: Bound on the bytes of deltas of this rank, or `None`. Once it is reached, later steps are kept
            without their deltas, and a warning says so once.
        background: Whether one thread encodes and publishes. Its errors are raised by the next call.

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
        background: bool = False,
    ) -> None:
        check_compression(settings.compression)
        self._segment_bytes = check_positive_int("segment_bytes", segment_bytes)
        self._size_budget = None if size_budget is None else check_positive_int("size_budget", size_budget, zero=True)
        self._files = files
        self._store_id = store_id
        self._signature = signature
        self._settings = settings
        self._log = CommitLog(files, store_id, rank)
        self._buffer: list[EncodedStep] = []
        self._buffered_bytes = 0
        self._delta_bytes = sum(ref.bytes - ref.head_bytes for ref in self._log.head.segments)
        self._n_steps = self._log.head.n_steps
        self._warned = False
        self._closed = False
        self._error: BaseException | None = None
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(_QUEUE_DEPTH)
        self._thread: threading.Thread | None = None
        if background:
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
        deltas: Sequence[LayerDelta] | None,
        status: StepStatus = StepStatus.STORED,
    ) -> int:
        """Append one step.

        Args:
            optimizer: Number of the optimizer that stepped.
            sample_ids: Ids of this rank's samples behind the step, with repeats.
            batch_size: Number of this rank's samples behind the step.
            seconds: Wall time since the previous step.
            deltas: Changes of layers, or `None` where the status says why there are none. With `background` they
                are read later, so they must not be changed afterwards.
            status: What happened to the delta.

        Returns:
            The step's ordinal.

        Raises:
            ValueError: an argument is out of range, a delta does not fit its layer, or a value is not finite.
            LightningUnlearnError: the writer is closed; or an earlier publication in the background failed.
        """
        if (deltas is None) == (status is StepStatus.STORED):
            raise ValueError(
                expected("deltas", f"{'given' if deltas is None else 'None'} for this status", status.name)
            )
        pending = _Pending(
            check_positive_int("optimizer", optimizer, zero=True),
            check_ids(sample_ids),
            check_positive_int("batch_size", batch_size, zero=True),
            float(seconds),
            tuple(deltas or ()),
            status,
        )
        for delta in pending.deltas:
            if not 0 <= delta.layer < len(self._signature.layers):
                raise ValueError(expected("layer", f"below {len(self._signature.layers)}", delta.layer))
        self._run(lambda: self._add(pending))
        self._n_steps += 1
        return self._n_steps - 1

    def flush(self) -> None:
        """Publish everything appended so far; when this returns, it survives a crash."""
        self._run(lambda: self._change(self._publish))
        self._wait()

    def truncate(self, n_steps: int) -> None:
        """Drop every step from `n_steps` on, in one commit.

        Raises:
            ValueError: there are fewer steps.
        """
        if check_positive_int("n_steps", n_steps, zero=True) > self._n_steps:
            raise ValueError(expected("n_steps", f"at most the {self._n_steps} steps there are", n_steps))
        self._run(lambda: self._change(lambda: self._truncate(n_steps)))
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
        self._raise_error()

    def _raise_error(self) -> None:
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

    def _add(self, pending: _Pending) -> None:
        layers = []
        for delta in pending.deltas:
            info = self._signature.layers[delta.layer]
            value_dtype = "float32" if info.kind == "buffer" else self._settings.value_dtype
            layers.append(encode_layer(delta, info.numel, value_dtype))
        step = self._encode(pending, pending.status, layers)
        if self._size_budget is not None and step.payload and self._delta_bytes + len(step.payload) > self._size_budget:
            step = self._encode(pending, StepStatus.OVER_BUDGET, [])
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
            self._change(self._publish)

    def _encode(self, pending: _Pending, status: StepStatus, layers: Sequence[EncodedLayer]) -> EncodedStep:
        return encode_step(
            optimizer=pending.optimizer,
            sample_ids=pending.sample_ids,
            batch_size=pending.batch_size,
            seconds=pending.seconds,
            status=status,
            layers=layers,
            compression=self._settings.compression,
        )

    def _change(self, change: Callable[[], None]) -> None:
        """Change what is on disk; after a failure it is unknown how far that went, so nothing may follow."""
        try:
            change()
        except BaseException as error:
            self._error = error
            raise

    def _publish(self) -> None:
        if not self._buffer:
            return
        ref, chunks = build_segment(
            self._buffer,
            name=self._log.segment_name(),
            start=self._log.head.n_steps,
            rank=self._log.rank,
            store_id=self._store_id,
            compression=self._settings.compression,
        )
        self._log.publish_segment(ref, chunks)
        self._log.commit((*self._log.head.segments, ref))
        self._buffer.clear()
        self._buffered_bytes = 0

    def _truncate(self, n_steps: int) -> None:
        del self._buffer[max(0, n_steps - self._log.head.n_steps) :]
        self._publish()
        segments = [ref for ref in self._log.head.segments if ref.stop <= n_steps]
        straddling = [ref for ref in self._log.head.segments if ref.start < n_steps < ref.stop]
        segments += [slice_segment(self._files, self._log, self._store_id, ref, n_steps) for ref in straddling]
        self._log.commit(segments)
        self._log.clean()
        self._delta_bytes = sum(ref.bytes - ref.head_bytes for ref in segments)
