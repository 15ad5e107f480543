"""Reading a store: look-ups, deltas, and whether all that was recorded is here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from lightning_unlearn.exceptions import MissingDeltaError
from lightning_unlearn.store.index import Ranges, in_ranges
from lightning_unlearn.store.info import StoreInfo
from lightning_unlearn.store.maintenance import total_bytes
from lightning_unlearn.store.reader import StoreReader
from lightning_unlearn.store.records import check_ids
from lightning_unlearn.store.store_documents import StoreDocuments
from lightning_unlearn.types import LayerDelta, SampleId, StepRecord, StepStatus
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.files import Files

__all__ = ["StoreView"]

_ATTEMPTS = 5


def _median(errors: npt.NDArray[np.float32]) -> float | None:
    measured = errors[~np.isnan(errors)]
    return float(np.median(measured)) if measured.size else None


class StoreView(StoreDocuments):
    """The reading half of `DeltaStore`.

    Reading sees what was committed when the store was opened or last refreshed. The model is never needed.
    """

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self._reader: StoreReader | None = None
        self._complete = False

    @property
    def reader(self) -> StoreReader:
        """The view of all ranks' steps that was committed at the last refresh.

        Raises:
            MissingDeltaError: parts of the store, which ranks of other nodes recorded there, are not here.
        """
        if not self._complete:
            self.check_complete()
        return self.here

    @property
    def here(self) -> StoreReader:
        """What the last refresh found in this place, whether or not parts of other nodes are missing."""
        if self._reader is None:
            self._reader = StoreReader(self._files, self.store_id, self.signature, self.world_size)
            self._lineage = None  # which names the pieces that these steps may be in
        return self._reader

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """Ranks without steps that known weights contain: they recorded on other nodes, and are to be joined."""
        known = self.lineage.n_steps
        # Rank 0 cannot be one of them: it made the store.
        return tuple(rank for rank, commit in enumerate(self.here.commits) if rank and commit.n_steps < known)

    def check_complete(self) -> None:
        """Check that every rank's steps are here.

        Raises:
            MissingDeltaError: some recorded theirs on another node, and were not joined yet.
        """
        for _ in range(_ATTEMPTS):
            missing, found = self.missing_ranks, (self.lineage.n_steps, self.here.commits)
            if not missing:
                break
            self.refresh()  # a writer that goes on may have changed one document between the readings of both
            if found == (self.lineage.n_steps, self.here.commits):
                break
        if missing:
            rule = f"whole, with {self.lineage.n_steps} steps of each of its {self.world_size} ranks"
            remedy = f"Join them from the nodes that recorded them: `lightning-unlearn store join {self.url} PART ...`."
            got = f"no part of rank {', '.join(map(str, missing))}"
            raise MissingDeltaError(expected("store", rule, got, remedy))
        self._complete = True

    @property
    def n_steps(self) -> int:
        """Number of recorded steps that every rank has committed."""
        return self.reader.n_steps

    def refresh(self) -> None:
        """See what was committed since.

        Raises:
            StoreCorruptedError: a document is damaged.
        """
        self._reader = self._lineage = None
        self._complete = False
        _ = self.here, self.lineage

    def info(self) -> StoreInfo:
        """What the store holds; reads every head and every id, but no delta."""
        index, lineage = self.here.index, self.lineage
        segments = [segment for rank in self.here.segments for segment in rank]
        kept = sum(int(segment.columns["kept"].sum()) for segment in segments)
        payload = sum(segment.ref.payload_bytes for segment in segments)
        return StoreInfo(
            url=self.url,
            store_id=self.store_id,
            format_versions=tuple(sorted({self.version, *(segment.version for segment in segments)})),
            steps=self.here.n_steps,
            stored=int((index.status == StepStatus.STORED).sum()),
            bytes=total_bytes(self._files, self.world_size),
            bytes_per_kept=payload / kept if kept else 0.0,
            kept=kept,
            distinct_ids=index.count_distinct(),
            seconds=float(index.seconds.sum()),
            pruning_error=_median(index.pruning_error),
            rounding_error=_median(index.rounding_error),
            edited=int(index.edited.sum()),
            world_size=self.world_size,
            settings=self.settings,
            data=self.data,
            runs=lineage.runs,
            states=lineage.states,
            entries=lineage.entries,
            missing_ranks=self.missing_ranks,
        )

    def record(self, step: int) -> StepRecord:
        """Everything about a step but its delta, merged over ranks; see `StoreReader.record`."""
        return self.reader.record(step)

    def read(self, step: int) -> dict[str, LayerDelta]:
        """The delta of a step by layer name, merged over ranks; see `StoreReader.read`."""
        return self.reader.read(step, self.pieces)

    def steps_of(self, sample_ids: Collection[SampleId], within: Ranges | None = None) -> npt.NDArray[np.int64]:
        """Steps that saw one of the ids, ascending, int64.

        Raises:
            ValueError: not a collection of integers and strings.
        """
        return self.counts_of(sample_ids, within)[0]

    def counts_of(
        self, sample_ids: Collection[SampleId], within: Ranges | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Steps that saw one of the ids, ascending, and how often the ids occur in each, with multiplicity."""
        return self.reader.index.counts_of(check_ids(sample_ids), within)

    def ids_in(self, steps: Iterable[int]) -> set[SampleId]:
        """The different ids of these steps."""
        return self.reader.index.ids_in(steps)

    def unseen(self, sample_ids: Iterable[SampleId], within: Ranges | None = None) -> list[SampleId]:
        """Those of the ids that occur in no step, in the given order."""
        return self.reader.index.unseen(check_ids(sample_ids), within)

    def batch_sizes(self, steps: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Number of samples behind each of the steps, over all ranks."""
        sizes: npt.NDArray[np.int64] = self.reader.index.batch_sizes[np.asarray(steps, np.int64)]
        return sizes

    def statuses(self, steps: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """`StepStatus` of each of the steps."""
        statuses: npt.NDArray[np.uint8] = self.reader.index.status[np.asarray(steps, np.int64)]
        return statuses

    def seconds_of(self, ranges: Ranges) -> float:
        """Wall time of all steps in the ranges."""
        return float(sum(self.reader.index.seconds[start:stop].sum() for start, stop in ranges))

    def lost_ids(self, ranges: Ranges) -> int:
        """Number of steps in the ranges whose ids were damaged and dropped by a repair."""
        index = self.reader.index
        steps = np.flatnonzero((index.status == StepStatus.LOST) & index.lost_ids)
        return int(in_ranges(steps, ranges).sum())

    def edited_steps(self, ranges: Ranges) -> int:
        """Number of steps in the ranges before which something other than an optimizer changed the weights."""
        return int(in_ranges(np.flatnonzero(self.reader.index.edited), ranges).sum())
