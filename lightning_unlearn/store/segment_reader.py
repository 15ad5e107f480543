"""Reading a segment: its head is in memory, everything else is read in slices and checked when it is."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_unlearn.store.compression import Compression
from lightning_unlearn.store.documents import FORMAT_VERSION
from lightning_unlearn.store.records import ENTRY, EncodedStep, ids_bytes, record_crc, record_numbers
from lightning_unlearn.store.segment import HEAD_COLUMNS, STEP_COLUMNS, Content, SegmentRef
from lightning_unlearn.store.segment_lookup import SegmentLookup
from lightning_unlearn.store.segment_tensors import Read, SegmentTensors
from lightning_unlearn.types import SampleId, StepStatus
from lightning_unlearn.utilities.file_views import DAMAGE, Raw

__all__ = ["Segment"]

Int64s: TypeAlias = npt.NDArray[np.int64]

_BODY = {"ids", "index.ids", "index.steps", "entries", "payload"}
_KEYS = {"key.offset", "key.text", "key.crc32"}
_NONE: Int64s = np.empty(0, np.int64)


def _distinct(ascending: npt.NDArray[np.signedinteger]) -> npt.NDArray[Any]:
    # as `np.unique`, which would sort what is sorted
    return ascending[np.concatenate(([True], ascending[1:] != ascending[:-1]))] if len(ascending) else ascending


class Segment:
    """One segment of a store.

    Args:
        ref: What the commit says of it.
        head: The first `ref.head_bytes` bytes of the file, of the current format version.
        read: Reads from the file.
        at_once: Whether a look-up reads the whole index in one go, as it should where every read is a request.
        check: Whether the head is known to be intact. Without it whatever can be read is given out, and only what fits
            its record's checksum is to be trusted; for repairs.

    Attributes:
        lookup: From ids to steps, and from codes to ids.
        compression: How payloads were compressed.
        columns: The `STEP_COLUMNS` of the head, of which some are attributes as well.

    Raises:
        ValueError: the head cannot be read, or holds another number of steps.
    """

    def __init__(self, ref: SegmentRef, head: Raw, read: Read, *, at_once: bool = False, check: bool = True) -> None:
        self.ref = ref
        self.n_steps = ref.stop - ref.start
        self.version = FORMAT_VERSION
        self._read = read
        self._at_once = at_once
        try:
            tensors = SegmentTensors(head, read)
            if not tensors.names >= _BODY or len(_KEYS & tensors.names) % len(_KEYS):
                raise KeyError(sorted((_BODY | _KEYS) - tensors.names))
            columns = {name: tensors.column(name) for name in HEAD_COLUMNS}
            self._payload_start = tensors.span("payload")[0]
            self.lookup = SegmentLookup(tensors, read, at_once=at_once, check=check)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"unreadable head ({error!r})") from error
        self._tensors = tensors
        self.compression: Compression = "zstd" if tensors.compression == "zstd" else None
        self.columns: dict[str, npt.NDArray[Any]] = {name: columns[name] for name in STEP_COLUMNS}
        self.batch_size: Int64s = columns["batch_size"]
        self.seconds: npt.NDArray[np.float64] = columns["seconds"]
        self.status: npt.NDArray[np.uint8] = columns["status"]
        self.ids_offset: Int64s = columns["ids_offset"]
        self._entry_offset: Int64s = columns["entry_offset"]
        self._payload_offset: Int64s = columns["payload_offset"]
        offsets = (self.ids_offset, self._entry_offset, self._payload_offset)
        lengths = {len(column) for column in self.columns.values()}
        if lengths != {self.n_steps} or {len(offset) for offset in offsets} != {self.n_steps + 1}:
            raise ValueError(f"columns of another length than {self.n_steps} steps")

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
        codes, table = self.codes(index), self.lookup.table
        ids: tuple[SampleId, ...] = tuple(codes.tolist() if table is None else map(table.__getitem__, codes.tolist()))
        start, stop = self._entry_offset[index : index + 2].tolist()
        entries = self._tensors.slice("entries", start, stop, ENTRY.itemsize)
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
        return np.frombuffer(self._tensors.slice("ids", start, stop), self.lookup.id_dtype)

    def distinct(self, steps: npt.NDArray[np.bool_] | None = None) -> Int64s:
        """The different codes of some steps, given as a mask, or of all.

        A few steps are read one by one, many from the index.

        Raises:
            ValueError, EOFError: as for `SegmentLookup.occurrences`.
        """
        if steps is not None and not self._at_once and np.count_nonzero(steps) < self.lookup.n_blocks:
            few = np.flatnonzero(steps).tolist()
            for index in few:
                self.step(index)
            return np.unique(np.concatenate([self.codes(index) for index in few], dtype=np.int64)) if few else _NONE
        if steps is not None and steps.all():
            steps = None
        found = [_distinct(ids if steps is None else ids[steps[places]]) for ids, places in self.lookup.index().scan()]
        return _distinct(np.concatenate(found, dtype=np.int64)) if found else _NONE

    def content(self) -> Content:
        """Everything but the payload, not checked: check every step first."""
        table, count = self.lookup.table, self._tensors.length("ids")
        return Content(
            self.columns,
            np.diff(self.ids_offset),
            np.diff(self._entry_offset),
            np.diff(self._payload_offset),
            np.frombuffer(self._tensors.slice("ids", 0, count), self.lookup.id_dtype),
            table,
            self._tensors.slice("entries", 0, self._tensors.length("entries")),
        )

    def all_payload(self) -> Raw:
        """The payload of all steps, not checked."""
        return self._read(self._payload_start, self._payload_start + int(self._payload_offset[-1]))

    def damaged_parts(self) -> Iterator[str]:
        """Names of the parts, other than steps, that do not fit their checksums or each other."""
        if self.lookup.has_damaged_keys():
            yield "key table"
        try:
            content = self.content()
        except DAMAGE:
            yield "id index"
            return
        if self.lookup.is_damaged(content.ids, content.ids_count):
            yield "id index"
