"""Looking ids up in one segment: its id index and its key table, read in the parts that are needed."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_unlearn.store.id_index import INDEX_BLOCK, IdIndex, index_columns
from lightning_unlearn.store.key_table import KEY_BLOCK, KeyTable
from lightning_unlearn.store.segment_tensors import Read, SegmentTensors
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.file_views import DAMAGE, Raw

__all__ = ["SegmentLookup"]

Int64s: TypeAlias = npt.NDArray[np.int64]


class SegmentLookup:
    """From ids to the steps of one segment, and from codes to ids.

    Where ids are keys, steps and index hold codes, which are places in the key table; otherwise an id is its own code.

    Args:
        tensors: Those of the segment.
        read: Reads from its file.
        at_once: Whether a look-up reads the whole index in one go, as it should where every read is a request.
        check: Whether key tables are checked as they are read.

    Raises:
        KeyError: a tensor is missing.
    """

    def __init__(self, tensors: SegmentTensors, read: Read, *, at_once: bool, check: bool) -> None:
        self._tensors = tensors
        self._read = read
        self._at_once = at_once
        self._check = check
        self._held: KeyTable | None = None
        self._key_crc32 = tensors.column("key.crc32") if "key.offset" in tensors.names else None
        self._fences: Int64s = tensors.column("index.fence")
        self._index_crc32: npt.NDArray[np.uint32] = tensors.column("index.crc32")
        self.id_dtype: np.dtype[np.signedinteger] = tensors.dtype("ids")

    @property
    def has_keys(self) -> bool:
        """Whether ids are places in a key table."""
        return self._key_crc32 is not None

    @property
    def n_blocks(self) -> int:
        """Number of blocks of the index."""
        return len(self._fences)

    @property
    def table(self) -> KeyTable | None:
        """The key table, over bytes that are read now; `None` where ids are integers."""
        if self._held is not None:
            return self._held
        table = self._table(self._check)
        if self._at_once:
            self._held = table
        return table

    @cached_property
    def _checked(self) -> npt.NDArray[np.bool_]:
        return np.zeros(-(-max(self._tensors.length("key.offset") - 1, 0) // KEY_BLOCK), np.bool_)

    def _table(self, check: bool) -> KeyTable | None:
        if self._key_crc32 is None:
            return None
        offsets = np.frombuffer(self._tensors.whole("key.offset"), "<i8")
        text = self._tensors.whole("key.text")
        if len(offsets) < 1 or len(self._checked) != len(self._key_crc32):
            raise ValueError("a key table of another length than its checksums")
        return KeyTable(offsets, text, self._key_crc32 if check else None, self._checked)

    def index(self) -> IdIndex:
        """The index from ids (or codes) to steps, over bytes that are read when they are needed."""
        tensors = self._tensors
        count = tensors.length("index.ids")
        blocks = -(-count // INDEX_BLOCK)
        if {count, blocks} != {tensors.length("ids"), self.n_blocks} or count != tensors.length("index.steps"):
            raise ValueError("an id index of another length than the ids")
        place, width = tensors.span("index.ids")[0], self.id_dtype.itemsize
        behind, stop = tensors.span("index.steps")
        read = self._read
        if self._at_once:
            data = read(place, stop)

            def read(start: int, stop: int) -> Raw:
                return data[start - place : stop - place]

        return IdIndex(
            self._fences,
            self._index_crc32,
            count,
            self.id_dtype,
            lambda start, stop: read(place + width * start, place + width * stop),
            lambda start, stop: read(behind + 4 * start, behind + 4 * stop),
        )

    def occurrences(self, sample_ids: Collection[SampleId]) -> tuple[Int64s, Int64s]:
        """Codes and steps (relative to the segment) of all occurrences of some ids; see `decode` for the codes.

        Raises:
            ValueError: a part of the index or key table does not fit its checksum.
            EOFError: the file is shorter than that.
        """
        table = self.table
        if table is None:
            bounds = np.iinfo(self.id_dtype)
            codes = [one for one in sample_ids if isinstance(one, int) and bounds.min <= one <= bounds.max]
        else:
            codes = [code for code in table.codes(sample_ids).tolist() if code >= 0]
        return self.index().find(np.unique(np.array(codes, np.int64)))

    def decode(self, codes: Int64s) -> list[SampleId]:
        """The ids behind some codes, checked whatever `check` is.

        Raises:
            ValueError: there is no such code, or its block of the key table is damaged.
        """
        table = self.table if self._check else self._table(True)
        return codes.tolist() if table is None else [table[code] for code in codes.tolist()]

    def is_damaged(self, ids: npt.NDArray[Any], ids_count: Int64s) -> bool:
        """Whether the index does not fit its checksums, or is not that of these ids."""
        try:
            if self.index().damaged_blocks():
                return True
            rebuilt = index_columns(ids, ids_count)
            same = np.array_equal(rebuilt.crc32, self._index_crc32) and np.array_equal(rebuilt.fences, self._fences)
        except DAMAGE:
            return True
        return not same

    def has_damaged_keys(self) -> bool:
        """Whether the key table cannot be read or does not fit its checksums."""
        try:
            table = self._table(True)
            if table is not None:
                table.check()
        except DAMAGE:
            return True
        return False
