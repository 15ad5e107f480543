"""One process that continues a store of several ranks."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.writer import StoreWriter
from lightning_unlearn.types import LayerDelta, SampleId, StepStatus

__all__ = ["JoinedWriter"]


class JoinedWriter:
    """Writes whole steps as rank 0's part, and empty parts for the other ranks, so that every rank has every step.

    A training on several devices may so be repaired, or continued, on one. Same duties as `StoreWriter`.

    Args:
        store: A store of several ranks; no other writer may be open.
        size_budget: Bound on the bytes of deltas.
        background: Whether threads write.

    Raises:
        StoreMismatchError: another writer has one of the parts.
    """

    def __init__(self, store: DeltaStore, *, size_budget: int | None = None, background: bool = False) -> None:
        self.rank = 0
        self._writers: list[StoreWriter] = []
        try:
            for rank in range(store.world_size):
                self._writers.append(store.writer(rank, size_budget=size_budget, background=background))
            # What a rank published ahead of the others before a crash is in no step of the store.
            self.truncate(min(writer.n_steps for writer in self._writers))
        except BaseException:
            self.abandon()
            raise

    @property
    def n_steps(self) -> int:
        """Steps that every part has."""
        return min(writer.n_steps for writer in self._writers)

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
        """Append one step and return its ordinal."""
        first, *others = self._writers
        step = first.append(
            optimizer=optimizer,
            sample_ids=sample_ids,
            batch_size=batch_size,
            seconds=seconds,
            deltas=deltas,
            status=status,
        )
        for writer in others:
            empty = None if deltas is None else ()
            writer.append(optimizer=optimizer, sample_ids=(), batch_size=0, seconds=0.0, deltas=empty, status=status)
        return step

    def flush(self) -> None:
        """Publish what was appended."""
        for writer in self._writers:
            writer.flush()

    def truncate(self, n_steps: int) -> None:
        """Drop every step from `n_steps` on."""
        for writer in self._writers:
            if writer.n_steps > n_steps:
                writer.truncate(n_steps)

    def close(self) -> None:
        """Flush and give the store back."""
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Give the store back without what was not flushed."""
        for writer in self._writers:
            writer.abandon()
