"""From sample ids to steps without reading all ids: the occurrences of a segment, sorted by id, in blocks.

The head of a segment holds the first id of every block and a checksum of it, so that a look-up reads, and checks, the
blocks in which an id can be and no others.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_unlearn.utilities.file_views import DAMAGE, Raw

__all__ = ["INDEX_BLOCK", "IdIndex", "Ids", "IndexColumns", "index_columns"]

Int64s: TypeAlias = npt.NDArray[np.int64]
Ids: TypeAlias = npt.NDArray[np.int64] | npt.NDArray[np.int32]

INDEX_BLOCK = 1024
"""Number of occurrences in one block."""

_SCAN = 256  # blocks that a scan holds at once


@dataclass(frozen=True, slots=True)
class IndexColumns:
    """An id index as arrays.

    Attributes:
        ids: Ids (or codes) of all occurrences, ascending; dtype of the segment's ids.
        steps: Their steps, relative to the segment, ascending where ids are equal; int32.
        fences: First id of every block; int64.
        crc32: CRC-32 of every block: its ids, then its steps; uint32.
    """

    ids: Ids
    steps: npt.NDArray[np.int32]
    fences: Int64s
    crc32: npt.NDArray[np.uint32]


def index_columns(ids: Ids, counts: npt.NDArray[np.integer]) -> IndexColumns:
    """Index of the ids of a segment.

    Args:
        ids: Ids (or codes) of all steps, one after the other.
        counts: Number of ids of each step.

    >>> index = index_columns(np.array([7, 3, 7, 5]), np.array([1, 2, 1]))
    >>> index.ids.tolist(), index.steps.tolist(), index.fences.tolist()
    ([3, 5, 7, 7], [1, 2, 0, 1], [3])
    """
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    steps = np.repeat(np.arange(len(counts), dtype="<i4"), counts)[order]
    places = range(0, len(ids), INDEX_BLOCK)
    crcs = [_crc(ordered[place : place + INDEX_BLOCK], steps[place : place + INDEX_BLOCK]) for place in places]
    return IndexColumns(ordered, steps, ordered[::INDEX_BLOCK].astype("<i8"), np.array(crcs, "<u4"))


def _crc(ids: npt.NDArray[np.integer], steps: npt.NDArray[np.integer]) -> int:
    return zlib.crc32(steps.data, zlib.crc32(ids.data)) if len(ids) else 0


class IdIndex:
    """A segment's index, read block by block.

    Args:
        fences: First id of every block.
        crc32: Checksum of every block.
        count: Number of occurrences.
        dtype: Dtype of the ids.
        read_ids: Returns the bytes of the ids from one occurrence to another.
        read_steps: The same of the steps.
    """

    def __init__(
        self,
        fences: Int64s,
        crc32: npt.NDArray[np.uint32],
        count: int,
        dtype: np.dtype[np.signedinteger],
        read_ids: Callable[[int, int], Raw],
        read_steps: Callable[[int, int], Raw],
    ) -> None:
        self._fences = fences
        self._crc32 = crc32
        self._count = count
        self._dtype = dtype
        self._read_ids = read_ids
        self._read_steps = read_steps

    def find(self, codes: Int64s) -> tuple[Int64s, Int64s]:
        """All occurrences of some ids.

        Args:
            codes: Ids (or codes), ascending and distinct, within the dtype of the index.

        Returns:
            Ids and steps of the occurrences, in the order of the index.

        Raises:
            ValueError: a block that was needed does not fit its checksum.
            EOFError: the file is shorter than the index.
        """
        found_ids, found_steps = [], []
        for start, stop in self._runs(codes):
            ids, steps = self._blocks(start, stop)
            here = codes[np.searchsorted(codes, ids[0], "left") : np.searchsorted(codes, ids[-1], "right")]
            wanted = here.astype(ids.dtype)  # of one dtype, or the search would convert all of `ids`
            left, right = np.searchsorted(ids, wanted, "left"), np.searchsorted(ids, wanted, "right")
            counts = right - left
            shifts = np.repeat(left - np.concatenate(([0], np.cumsum(counts[:-1]))), counts) if len(counts) else left
            places = np.arange(int(counts.sum())) + shifts
            found_ids.append(np.repeat(here, counts))
            found_steps.append(steps[places].astype(np.int64))
        if not found_ids:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate(found_ids), np.concatenate(found_steps)

    def scan(self) -> Iterator[tuple[Ids, npt.NDArray[np.int32]]]:
        """Ids and steps of all occurrences, some blocks at a time, checked."""
        for start in range(0, len(self._fences), _SCAN):
            yield self._blocks(start, min(start + _SCAN, len(self._fences)))

    def damaged_blocks(self) -> list[int]:
        """Numbers of the blocks that cannot be read or do not fit their checksum."""
        damaged = []
        for block in range(len(self._fences)):
            try:
                self._blocks(block, block + 1)
            except DAMAGE:
                damaged.append(block)
        return damaged

    def _runs(self, codes: Int64s) -> Iterator[tuple[int, int]]:
        """Half-open runs of blocks in which the ids can be."""
        if not len(codes) or not len(self._fences):
            return
        # an id that begins a block may have begun in the block before it
        first = np.maximum(np.searchsorted(self._fences, codes, "left") - 1, 0)
        last = np.searchsorted(self._fences, codes, "right")
        touched = np.zeros(len(self._fences) + 2, np.int64)
        np.add.at(touched, first[last > 0] + 1, 1)
        np.add.at(touched, last[last > 0] + 1, -1)
        bounds = np.flatnonzero(np.diff((np.cumsum(touched) > 0).astype(np.int8))).reshape(-1, 2)
        yield from map(tuple, bounds.tolist())

    def _blocks(self, start: int, stop: int) -> tuple[Ids, npt.NDArray[np.int32]]:
        first, last = start * INDEX_BLOCK, min(stop * INDEX_BLOCK, self._count)
        ids = np.frombuffer(self._read_ids(first, last), self._dtype)
        steps = np.frombuffer(self._read_steps(first, last), "<i4")
        for block in range(start, stop):
            place = slice((block - start) * INDEX_BLOCK, (block - start + 1) * INDEX_BLOCK)
            if _crc(ids[place], steps[place]) != int(self._crc32[block]):
                raise ValueError(f"block {block} of the id index does not fit its checksum")
        return ids, steps
