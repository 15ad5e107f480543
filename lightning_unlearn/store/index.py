"""What can be told from the heads of the segments alone: which steps saw which ids, batch sizes, seconds, status."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_unlearn.store.segment import Segment
from lightning_unlearn.types import SampleId

__all__ = ["Ranges", "StepIndex", "in_ranges"]

Ranges: TypeAlias = Sequence[tuple[int, int]]
"""Half-open ranges of steps, ascending and disjoint."""

Int64s: TypeAlias = npt.NDArray[np.int64]


def in_ranges(steps: Int64s, within: Ranges | None) -> npt.NDArray[np.bool_]:
    """Which of the steps lie in one of the ranges; all of them for `None`.

    >>> in_ranges(np.array([0, 4, 5, 9]), [(0, 5), (9, 10)]).tolist()
    [True, True, False, True]
    """
    if within is None:
        return np.ones(len(steps), np.bool_)
    bounds = np.array(within, np.int64).reshape(-1)
    inside: npt.NDArray[np.bool_] = np.searchsorted(bounds, steps, side="right") % 2 == 1
    return inside


class StepIndex:
    """Columns of all ranks' segments, merged step by step.

    Args:
        ranks: The segments of each rank, ascending.
        n_steps: Number of steps that every rank has; later ones are not seen.
    """

    def __init__(self, ranks: Sequence[Sequence[Segment]], n_steps: int) -> None:
        self.n_steps = n_steps
        self._segments = [segment for segments in ranks for segment in segments]
        self.batch_sizes = self._merge(np.int64, lambda segment: segment.batch_size, np.add)
        self.seconds = self._merge(np.float64, lambda segment: segment.seconds, np.maximum)
        self.optimizer = self._merge(np.int32, lambda segment: segment.optimizer, np.minimum)
        # the numbers of the statuses ascend in what is lost, so the largest is that of the merged step
        self.status = self._merge(np.uint8, lambda segment: segment.status, np.maximum)

    def _merge(
        self, dtype: type[np.generic], column: Callable[[Segment], npt.NDArray[np.generic]], by: np.ufunc
    ) -> Any:
        merged = np.zeros(self.n_steps, dtype)
        for segment in self._segments:
            start, stop = segment.ref.start, min(segment.ref.stop, self.n_steps)
            if start < stop:
                merged[start:stop] = by(merged[start:stop], column(segment)[: stop - start])
        return merged

    def counts_of(self, sample_ids: Collection[SampleId], within: Ranges | None = None) -> tuple[Int64s, Int64s]:
        """Steps that saw one of the ids, ascending, and how often they occur in each."""
        counts = np.zeros(self.n_steps, np.int64)
        for segment in self._segments:
            steps = self._steps_at(segment, segment.positions(sample_ids))
            counts += np.bincount(steps[steps < self.n_steps], minlength=self.n_steps)
        steps = np.flatnonzero(counts)
        steps = steps[in_ranges(steps, within)]
        return steps, counts[steps]

    def ids_in(self, steps: Iterable[int]) -> set[SampleId]:
        """The different ids of these steps."""
        wanted = np.zeros(self.n_steps, np.bool_)
        wanted[np.fromiter(steps, np.int64)] = True
        ids: set[SampleId] = set()
        for segment in self._segments:
            mask = np.zeros(segment.n_steps, np.bool_)
            visible = wanted[segment.ref.start : segment.ref.stop]
            mask[: len(visible)] = visible
            ids.update(segment.distinct(np.repeat(mask, np.diff(segment.ids_offset)).nonzero()[0]))
        return ids

    def unseen(self, sample_ids: Iterable[SampleId], within: Ranges | None = None) -> list[SampleId]:
        """Those of the ids that occur in no step, in the given order."""
        wanted = list(sample_ids)
        seen: set[SampleId] = set()
        for segment in self._segments:
            positions = segment.positions(wanted)
            steps = self._steps_at(segment, positions)
            visible = (steps < self.n_steps) & in_ranges(steps, within)
            seen.update(segment.distinct(positions[visible]))
        return [sample_id for sample_id in wanted if sample_id not in seen]

    @staticmethod
    def _steps_at(segment: Segment, positions: Int64s) -> Int64s:
        return segment.ref.start + np.searchsorted(segment.ids_offset, positions, side="right") - 1
