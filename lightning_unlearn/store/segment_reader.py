"""Reading a segment: its head is in memory, everything else is read in slices and checked when it is."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_unlearn.store.compression import Compression
from lightning_unlearn.store.documents import FORMAT_VERSION
from lightning_unlearn.store.id_index import INDEX_BLOCK, IdIndex, index_columns
from lightning_unlearn.store.key_table import KEY_BLOCK, KeyTable
from lightning_unlearn.store.records import ENTRY, EncodedStep, ids_bytes, record_crc, record_numbers
from lightning_unlearn.store.segment import HEAD_COLUMNS, NUMPY, STEP_COLUMNS, Content, SegmentRef, read_header
from lightning_unlearn.types import SampleId, StepStatus
from lightning_unlearn.utilities.file_views import DAMAGE, Raw

__all__ = ["Read", "Segment"]

Int64s: TypeAlias = npt.NDArray[np.int64]
Read: TypeAlias = Callable[[int, int], Raw]
"""Returns bytes of a file from one place to another, all of them, or raises `EOFError`."""

_BODY = {"ids", "index.ids", "index.steps", "entries", "payload"}
_KEYS = {"key.offset", "key.text", "key.crc32"}
_NONE: Int64s = np.empty(0, np.int64)


def _distinct(ascending: npt.NDArray[np.signedinteger]) -> npt.NDArray[Any]:
    # as `np.unique`, which would sort what is sorted
    return ascending[np.concatenate(([True], ascending[1:] != ascending[:-1]))] if len(ascending) else ascending


def _span(info: Mapping[str, Any], first: int) -> tuple[np.dtype[Any], int, int]:
    start, stop = info["data_offsets"]
    return NUMPY[info["dtype"]], first + int(start), first + int(stop)


class Segment:
    """One segment of a store.

    Args:
        ref: What the commit says of it.
        head: The first `ref.head_bytes` bytes of the file, of the current format version.
        read: Reads from the file.
        at_once: Whether a look-up reads the whole index in one go, as it should where every read is a request.
        check: Whether the head is known to be intact. Without it whatever can be read is given out, and only what fits
            its record's checksum is to be trusted; for repairs.

    Raises:
        ValueError: the head cannot be read, or holds another number of steps.
    """

    def __init__(self, ref: SegmentRef, head: Raw, read: Read, *, at_once: bool = False, check: bool = True) -> None:
        self.ref = ref
        self.n_steps = ref.stop - ref.start
        self.version = FORMAT_VERSION
        self._read = read
        self._at_once = at_once
        self._check = check
        self._held: KeyTable | None = None
        try:
            header, first = read_header(head)
            compression = header.pop("__metadata__")["compression"]
            self._spans = {name: _span(info, first) for name, info in header.items()}
            if not set(self._spans) >= _BODY or len(_KEYS & set(self._spans)) % len(_KEYS):
                raise KeyError(sorted((_BODY | _KEYS) - set(self._spans)))
            columns = {name: self._column(head, name) for name in HEAD_COLUMNS}
            self._key_crc32 = self._column(head, "key.crc32") if "key.offset" in self._spans else None
            self._payload_start = self._spans["payload"][1]
            self._id_dtype: np.dtype[np.signedinteger] = self._spans["ids"][0]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"unreadable head ({error!r})") from error
        self.compression: Compression = "zstd" if compression == "zstd" else None
        self.columns: dict[str, npt.NDArray[Any]] = {name: columns[name] for name in STEP_COLUMNS}
        self.batch_size: Int64s = columns["batch_size"]
        self.seconds: npt.NDArray[np.float64] = columns["seconds"]
        self.status: npt.NDArray[np.uint8] = columns["status"]
        self.ids_offset: Int64s = columns["ids_offset"]
        self._entry_offset: Int64s = columns["entry_offset"]
        self._payload_offset: Int64s = columns["payload_offset"]
        self._fences: Int64s = columns["index.fence"]
        self._index_crc32: npt.NDArray[np.uint32] = columns["index.crc32"]
        offsets = (self.ids_offset, self._entry_offset, self._payload_offset)
        lengths = {len(column) for column in self.columns.values()}
        if lengths != {self.n_steps} or {len(offset) for offset in offsets} != {self.n_steps + 1}:
            raise ValueError(f"columns of another length than {self.n_steps} steps")

    def _column(self, head: Raw, name: str) -> npt.NDArray[Any]:
        dtype, start, stop = self._spans[name]
        return np.frombuffer(head[start:stop], dtype)

    def _slice(self, name: str, start: int, stop: int, width: int = 1) -> Raw:
        """Elements `start` to `stop` of a tensor of the body, or of groups of `width` elements."""
        dtype, first, last = self._spans[name]
        size = width * dtype.itemsize
        if not 0 <= start <= stop <= (last - first) // size:
            raise ValueError(f"{name} from {start} to {stop} of {(last - first) // size}")
        return self._read(first + start * size, first + stop * size)

    def _length(self, name: str) -> int:
        dtype, first, last = self._spans[name]
        return (last - first) // dtype.itemsize

    # --- one step

    def payload_span(self, index: int) -> tuple[int, int]:
        """Where in the file the payload of the `index`-th step lies."""
        start, stop = self._payload_offset[index : index + 2].tolist()
        return self._payload_start + start, self._payload_start + stop

    def payload(self, index: int) -> Raw:
        """The payload of the `index`-th step, checked.

        Raises:
            ValueError: it does not fit its checksum.
            EOFError: the file is shorter than that.
        """
        payload = self._read(*self.payload_span(index))
        self.check_payload(index, payload)
        return payload

    def check_payload(self, index: int, payload: Raw) -> None:
        """Check a payload against its checksum.

        Raises:
            ValueError: it does not fit.
        """
        if zlib.crc32(payload) != int(self.columns["payload_crc32"][index]):
            raise ValueError("the payload does not fit its checksum")

    def step(self, index: int, payload: Raw = b"") -> EncodedStep:
        """The `index`-th step, around a payload that was read already; everything but the payload is checked.

        Raises:
            ValueError: the record does not fit its checksum.
            EOFError: the file is shorter than that.
        """
        codes, table = self.codes(index), self.table
        ids: tuple[SampleId, ...] = tuple(codes.tolist() if table is None else map(table.__getitem__, codes.tolist()))
        start, stop = self._entry_offset[index : index + 2].tolist()
        entries = self._slice("entries", start, stop, ENTRY.itemsize)
        step = replace(self.without_delta(index, ids), entries=np.frombuffer(entries, ENTRY), payload=payload)
        plain = codes.astype("<i8").tobytes() if table is None else ids_bytes(ids)
        payload_crc, kept = int(self.columns["payload_crc32"][index]), int(step.entries["kept"].sum())
        crc = record_crc(record_numbers(self.ref.start + index, step), plain, entries, payload_crc)
        if crc != int(self.columns["record_crc32"][index]) or kept != int(self.columns["kept"][index]):
            raise ValueError("the record does not fit its checksum")
        return step

    def without_delta(self, index: int, sample_ids: tuple[SampleId, ...]) -> EncodedStep:
        """What the head says of the `index`-th step, and these ids; no layers. Not checked but by the head's digest."""
        row = {name: self.columns[name][index].item() for name in STEP_COLUMNS}
        if row["edited"] not in (0, 1):
            raise ValueError(f"a step that is edited {row['edited']} times")
        return EncodedStep(
            optimizer=row["optimizer"],
            sample_ids=sample_ids,
            batch_size=row["batch_size"],
            seconds=row["seconds"],
            status=StepStatus(row["status"]),
            entries=np.empty(0, ENTRY),
            payload=b"",
            pruning_error=row["pruning_error"],
            rounding_error=row["rounding_error"],
            edited=bool(row["edited"]),
        )

    def codes(self, index: int) -> npt.NDArray[np.signedinteger]:
        """Ids of the `index`-th step, or their codes in the table; not checked, `step` does that."""
        start, stop = self.ids_offset[index : index + 2].tolist()
        return np.frombuffer(self._slice("ids", start, stop), self._id_dtype)

    # --- look-ups

    @cached_property
    def _checked(self) -> npt.NDArray[np.bool_]:
        return np.zeros(-(-max(self._length("key.offset") - 1, 0) // KEY_BLOCK), np.bool_)

    @property
    def has_keys(self) -> bool:
        """Whether ids are places in a key table."""
        return self._key_crc32 is not None

    @property
    def table(self) -> KeyTable | None:
        """The key table, over bytes that are read now; `None` where ids are integers."""
        if self._held is not None:
            return self._held
        table = self._table(self._check)
        if self._at_once:
            self._held = table
        return table

    def _table(self, check: bool) -> KeyTable | None:
        if self._key_crc32 is None:
            return None
        offsets = np.frombuffer(self._slice("key.offset", 0, self._length("key.offset")), "<i8")
        text = self._slice("key.text", 0, self._length("key.text"))
        if len(offsets) < 1 or len(self._checked) != len(self._key_crc32):
            raise ValueError("a key table of another length than its checksums")
        return KeyTable(offsets, text, self._key_crc32 if check else None, self._checked)

    def index(self) -> IdIndex:
        """The index from ids (or codes) to steps, over bytes that are read when they are needed."""
        count = self._length("index.ids")
        blocks = -(-count // INDEX_BLOCK)
        if {count, blocks} != {self._length("ids"), len(self._fences)} or count != self._length("index.steps"):
            raise ValueError("an id index of another length than the ids")
        place, width = self._spans["index.ids"][1], self._id_dtype.itemsize
        behind, stop = self._spans["index.steps"][1:]
        read = self._read
        if self._at_once:
            data = read(place, stop)

            def read(start: int, stop: int) -> Raw:
                return data[start - place : stop - place]

        return IdIndex(
            self._fences,
            self._index_crc32,
            count,
            self._id_dtype,
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
            bounds = np.iinfo(self._id_dtype)
            codes = [one for one in sample_ids if isinstance(one, int) and bounds.min <= one <= bounds.max]
        else:
            codes = [code for code in table.codes(sample_ids).tolist() if code >= 0]
        return self.index().find(np.unique(np.array(codes, np.int64)))

    def distinct(self, steps: npt.NDArray[np.bool_] | None = None) -> Int64s:
        """The different codes of some steps, given as a mask, or of all.

        A few steps are read one by one, many from the index.

        Raises:
            ValueError, EOFError: as for `occurrences`.
        """
        if steps is not None and not self._at_once and np.count_nonzero(steps) < len(self._fences):
            few = np.flatnonzero(steps).tolist()
            for index in few:
                self.step(index)
            return np.unique(np.concatenate([self.codes(index) for index in few], dtype=np.int64)) if few else _NONE
        if steps is not None and steps.all():
            steps = None
        found = [_distinct(ids if steps is None else ids[steps[places]]) for ids, places in self.index().scan()]
        return _distinct(np.concatenate(found, dtype=np.int64)) if found else _NONE

    def decode(self, codes: Int64s) -> list[SampleId]:
        """The ids behind some codes, checked whatever `check` is.

        Raises:
            ValueError: there is no such code, or its block of the key table is damaged.
        """
        table = self.table if self._check else self._table(True)
        return codes.tolist() if table is None else [table[code] for code in codes.tolist()]

    # --- the whole of it

    def content(self) -> Content:
        """Everything but the payload, not checked: check every step first."""
        table, count = self.table, self._length("ids")
        return Content(
            self.columns,
            np.diff(self.ids_offset),
            np.diff(self._entry_offset),
            np.diff(self._payload_offset),
            np.frombuffer(self._slice("ids", 0, count), self._id_dtype),
            table,
            self._slice("entries", 0, self._length("entries")),
        )

    def all_payload(self) -> Raw:
        """The payload of all steps, not checked."""
        return self._read(self._payload_start, self._payload_start + int(self._payload_offset[-1]))

    def damaged_parts(self) -> Iterator[str]:
        """Names of the parts, other than steps, that do not fit their checksums or each other."""
        try:
            table = self._table(True)
            if table is not None:
                table.check()
        except DAMAGE:
            yield "key table"
        try:
            damaged = self.index().damaged_blocks()
            content = self.content()
            rebuilt = index_columns(content.ids, content.ids_count) if not damaged else None
            if rebuilt is not None:
                same = np.array_equal(rebuilt.crc32, self._index_crc32) and np.array_equal(rebuilt.fences, self._fences)
                damaged = [] if same else [0]
        except DAMAGE:
            damaged = [0]
        if damaged:
            yield "id index"
