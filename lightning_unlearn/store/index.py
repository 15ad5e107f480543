"""What can be told from the heads of the segments alone: which steps saw which ids, batch sizes, seconds, status."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_unlearn.store.records import UNKNOWN_OPTIMIZER
from lightning_unlearn.store.segment_reader import Segment
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.file_views import DAMAGE

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
    """Columns of all ranks' segments, merged step by step; ids are looked up in the segments when they are asked for.

    The errors of a step are the largest of its ranks, each of which measured its own layers; NaN where none did.

    Args:
        ranks: The segments of each rank, ascending.
        n_steps: Number of steps that every rank has; later ones are not seen.
        failed: Makes the error to raise where a segment's index or ids are damaged.
    """

    def __init__(
        self,
        ranks: Sequence[Sequence[Segment]],
        n_steps: int,
        failed: Callable[[Segment, Exception], Exception],
    ) -> None:
        self.n_steps = n_steps
        self._segments = [segment for segments in ranks for segment in segments]
        self._failed = failed
        self.batch_sizes = self._merge(np.int64, "batch_size", np.add)
        self.seconds = self._merge(np.float64, "seconds", np.maximum)
        self.lost_ids: npt.NDArray[np.bool_] = self._merge(np.int32, "optimizer", np.minimum) == UNKNOWN_OPTIMIZER
        # the numbers of the statuses ascend in what is lost, so the largest is that of the merged step
        self.status = self._merge(np.uint8, "status", np.maximum)
        self.edited = self._merge(np.uint8, "edited", np.maximum)
        self.pruning_error = self._merge(np.float32, "pruning_error", np.fmax, math.nan)
        self.rounding_error = self._merge(np.float32, "rounding_error", np.fmax, math.nan)

    def _merge(self, dtype: type[np.generic], column: str, by: np.ufunc, empty: float = 0) -> Any:
        merged = np.full(self.n_steps, empty, dtype)
        for segment in self._segments:
            start, stop = segment.ref.start, min(segment.ref.stop, self.n_steps)
            if start < stop:
                merged[start:stop] = by(merged[start:stop], segment.columns[column][: stop - start])
        return merged

    @contextmanager
    def _named(self, segment: Segment) -> Iterator[None]:
        try:
            yield
        except DAMAGE as error:
            raise self._failed(segment, error) from error

    def counts_of(self, sample_ids: Collection[SampleId], within: Ranges | None = None) -> tuple[Int64s, Int64s]:
        """Steps that saw one of the ids, ascending, and how often they occur in each."""
        counts = np.zeros(self.n_steps, np.int64)
        for segment in self._segments:
            with self._named(segment):
                _, steps = segment.lookup.occurrences(sample_ids)
            here = counts[segment.ref.start : segment.ref.stop]
            here += np.bincount(steps, minlength=segment.n_steps)[: len(here)]
        steps = np.flatnonzero(counts)
        steps = steps[in_ranges(steps, within)]
        return steps, counts[steps]

    def _codes_in(self, segment: Segment, wanted: npt.NDArray[np.bool_]) -> Int64s:
        """The different codes of the wanted steps."""
        visible = wanted[segment.ref.start : segment.ref.stop]
        if not visible.any():
            return np.empty(0, np.int64)
        mask = np.zeros(segment.n_steps, np.bool_)
        mask[: len(visible)] = visible
        return segment.distinct(mask)

    def ids_in(self, steps: Iterable[int]) -> set[SampleId]:
        """The different ids of these steps."""
        wanted = np.zeros(self.n_steps, np.bool_)
        wanted[np.fromiter(steps, np.int64)] = True
        ids: set[SampleId] = set()
        for segment in self._segments:
            with self._named(segment):
                ids.update(segment.lookup.decode(self._codes_in(segment, wanted)))
        return ids

    def count_distinct(self) -> int:
        """Number of different ids in all steps."""
        everything, numbers, others = np.ones(self.n_steps, np.bool_), np.empty(0, np.int64), set[SampleId]()
        for segment in self._segments:
            with self._named(segment):
                codes = self._codes_in(segment, everything)
                if segment.lookup.has_keys:
                    others.update(segment.lookup.decode(codes))
                else:
                    numbers = np.concatenate((numbers, np.setdiff1d(codes, numbers, assume_unique=True)))
        numbers.sort()
        return len(numbers) + sum(1 for one in others if not (isinstance(one, int) and _among(numbers, one)))

    def unseen(self, sample_ids: Iterable[SampleId], within: Ranges | None = None) -> list[SampleId]:
        """Those of the ids that occur in no step, in the given order."""
        wanted = list(sample_ids)
        seen: set[SampleId] = set()
        for segment in self._segments:
            with self._named(segment):
                codes, steps = segment.lookup.occurrences(wanted)
                steps = steps + segment.ref.start
                visible = (steps < self.n_steps) & in_ranges(steps, within)
                seen.update(segment.lookup.decode(np.unique(codes[visible])))
        return [sample_id for sample_id in wanted if sample_id not in seen]


def _among(numbers: Int64s, one: int) -> bool:
    place = int(np.searchsorted(numbers, one)) if -(2**63) <= one < 2**63 else len(numbers)
    return place < len(numbers) and int(numbers[place]) == one
