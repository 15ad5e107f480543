"""One process that continues a store of several ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.step_encoder import Deltas
from lightning_unlearn.store.writer import Background, StoreWriter
from lightning_unlearn.types import SampleId, StepStatus
from lightning_unlearn.utilities.rng import RngState

__all__ = ["JoinedWriter"]


class JoinedWriter:
    """Writes whole steps as rank 0's part, and empty parts for the other ranks, so that every rank has every step.

    A training on several devices may so be repaired, or continued, on one. Same duties as `StoreWriter`.

    Args:
        store: A store of several ranks; no other writer may be open.
        size_budget: Bound on the bytes of deltas.
        background: What threads do; see `StoreWriter`.

    Raises:
        StoreMismatchError: another writer has one of the parts.
        MissingDeltaError: a part was recorded on another node, and is not joined yet.
    """

    def __init__(self, store: DeltaStore, *, size_budget: int | None = None, background: Background = "auto") -> None:
        self.rank = 0
        # Steps that the missing part has would be dropped here as what one rank was ahead.
        store.check_complete()
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
        deltas: Deltas | None,
        status: StepStatus = StepStatus.STORED,
        pruning_error: float | Callable[[], float] | None = None,
        edited: bool | Callable[[], bool] = False,
    ) -> int:
        """Append one step and return its ordinal; see `StoreWriter.append`."""
        first, *others = self._writers
        step = first.append(
            optimizer=optimizer,
            sample_ids=sample_ids,
            batch_size=batch_size,
            seconds=seconds,
            deltas=deltas,
            status=status,
            pruning_error=pruning_error,
            edited=edited,
        )
        for writer in others:
            empty = None if deltas is None else ()
            writer.append(optimizer=optimizer, sample_ids=(), batch_size=0, seconds=0.0, deltas=empty, status=status)
        return step

    def anchor(
        self,
        weights: Mapping[str, Tensor] | None,
        optimizers: Sequence[Mapping[str, Any]] | None,
        rng: RngState | None,
    ) -> None:
        """Keep the state of the training after the steps appended so far, as rank 0's; see `StoreWriter.anchor`."""
        self._writers[0].anchor(weights, optimizers, rng)

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
