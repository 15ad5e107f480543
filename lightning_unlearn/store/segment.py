"""One immutable safetensors file that holds many steps, column by column.

All columns come first (the *head*), the payload of all steps last, so that a reader loads the head once and then reads
any step with one range request. The commit that lists a segment holds the head's digest, and the head holds a CRC-32
of every step's payload: no byte is outside a checksum.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_unlearn.store.compression import Compression
from lightning_unlearn.store.documents import FORMAT_VERSION, digest_of
from lightning_unlearn.store.records import ENTRY, EncodedStep, Ids, IdTable, record_crc
from lightning_unlearn.types import SampleId, StepStatus

__all__ = ["Segment", "SegmentRef", "build_segment", "read_header"]

_DTYPES: dict[str, str] = {"<f8": "F64", "<i8": "I64", "<i4": "I32", "<u4": "U32", "|u1": "U8"}
_NUMPY = {name: np.dtype(code) for code, name in _DTYPES.items()}
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """What a commit says of one segment.

    Attributes:
        name: File name in the rank's directory.
        start: First step.
        stop: One behind the last step.
        bytes: Size of the file.
        head_bytes: Size of the head: everything before the payload.
        digest: BLAKE2b of the head.
    """

    name: str
    start: int
    stop: int
    bytes: int
    head_bytes: int
    digest: str


def _head(columns: Mapping[str, npt.NDArray[Any]], payload_bytes: int, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position, parts = 0, []
    for name, column in sorted(columns.items(), key=lambda item: -item[1].itemsize):
        data = np.ascontiguousarray(column).tobytes()
        offsets = [position, position + len(data)]
        header[name] = {"dtype": _DTYPES[column.dtype.str], "shape": [len(column)], "data_offsets": offsets}
        position += len(data)
        parts.append(data)
    offsets = [position, position + payload_bytes]
    header["payload"] = {"dtype": "U8", "shape": [payload_bytes], "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def _offsets(lengths: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.cumsum([0, *lengths], dtype="<i8")


def _id_columns(steps: Sequence[EncodedStep]) -> dict[str, npt.NDArray[Any]]:
    flat = [sample_id for step in steps for sample_id in step.sample_ids]
    columns: dict[str, npt.NDArray[Any]] = {"ids_offset": _offsets([len(step.sample_ids) for step in steps])}
    try:
        if not all(isinstance(sample_id, int) for sample_id in flat):
            raise OverflowError
        ids = np.array(flat, "<i8")
    except OverflowError:  # strings, or integers beyond 64 bits
        table = IdTable.of(flat)
        lookup = {table[code]: code for code in range(len(table))}
        ids = np.array([lookup[sample_id] for sample_id in flat], "<i8")
        columns |= {"key_offset": table.offsets, "key_text": table.text}
    small = not ids.size or (ids.min() >= _INT32.min and ids.max() <= _INT32.max)
    return columns | {"ids": ids.astype("<i4") if small else ids}


def build_segment(
    steps: Sequence[EncodedStep], *, name: str, start: int, rank: int, store_id: str, compression: Compression
) -> tuple[SegmentRef, list[bytes]]:
    """The file that holds `steps`, in pieces, and what the commit has to say of it."""
    entries = np.concatenate([step.entries for step in steps])
    payload_crcs = [zlib.crc32(step.payload) for step in steps]
    record_crcs = [
        record_crc(start + i, step, crc) for i, (step, crc) in enumerate(zip(steps, payload_crcs, strict=True))
    ]
    columns = {
        "optimizer": np.array([step.optimizer for step in steps], "<i4"),
        "batch_size": np.array([step.batch_size for step in steps], "<i8"),
        "seconds": np.array([step.seconds for step in steps], "<f8"),
        "status": np.array([step.status for step in steps], "u1"),
        "record_crc32": np.array(record_crcs, "<u4"),
        "payload_crc32": np.array(payload_crcs, "<u4"),
        "payload_offset": _offsets([len(step.payload) for step in steps]),
        "entry_offset": _offsets([len(step.entries) for step in steps]),
        **{f"entry.{field}": entries[field] for field in ENTRY.names or ()},
        **_id_columns(steps),
    }
    metadata = {
        "format": "lightning-unlearn/segment",
        "version": str(FORMAT_VERSION),
        "store_id": store_id,
        "rank": str(rank),
        "start": str(start),
        "compression": compression or "none",
    }
    head = _head(columns, int(columns["payload_offset"][-1]), metadata)
    payloads = [step.payload for step in steps]
    size = len(head) + sum(map(len, payloads))
    return SegmentRef(name, start, start + len(steps), size, len(head), digest_of(head)), [head, *payloads]


def read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and where the tensors begin."""
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), 8 + length


class Segment:
    """A segment's head in memory: everything about its steps but the payload.

    Args:
        ref: What the commit says of it.
        head: The first `ref.head_bytes` bytes of the file.

    Raises:
        ValueError: the head cannot be read, or holds another number of steps.
    """

    def __init__(self, ref: SegmentRef, head: bytes) -> None:
        self.ref = ref
        self.n_steps = ref.stop - ref.start
        try:
            columns = self._columns(head)
            self.optimizer = columns["optimizer"]
            self.batch_size: npt.NDArray[np.int64] = columns["batch_size"]
            self.seconds: npt.NDArray[np.float64] = columns["seconds"]
            self.status: npt.NDArray[np.uint8] = columns["status"]
            self.payload_crc32 = columns["payload_crc32"]
            self.ids: Ids = columns["ids"]
            self.ids_offset: npt.NDArray[np.int64] = columns["ids_offset"]
            self.table = IdTable(columns["key_offset"], columns["key_text"]) if "key_offset" in columns else None
            self._record_crc32 = columns["record_crc32"]
            self._payload_offset = columns["payload_offset"]
            self._entry_offset = columns["entry_offset"]
            self.entries = np.empty(len(columns["entry.layer"]), ENTRY)
            for field in ENTRY.names or ():
                self.entries[field] = columns[f"entry.{field}"]
        except (KeyError, TypeError, IndexError, struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"unreadable head ({error})") from error
        rows = (self.optimizer, self.batch_size, self.seconds, self.status, self._record_crc32, self.payload_crc32)
        offsets = (self._payload_offset, self._entry_offset, self.ids_offset)
        if {len(row) for row in rows} != {self.n_steps} or {len(offset) for offset in offsets} != {self.n_steps + 1}:
            raise ValueError(f"columns of another length than {self.n_steps} steps")

    def _columns(self, head: bytes) -> dict[str, npt.NDArray[Any]]:
        header, body = read_header(head)
        compression = header.pop("__metadata__")["compression"]
        self.compression: Compression = "zstd" if compression == "zstd" else None
        header.pop("payload")
        columns = {}
        for name, info in header.items():
            start, stop = (body + offset for offset in info["data_offsets"])
            columns[name] = np.frombuffer(head[start:stop], _NUMPY[info["dtype"]])
        return columns

    def payload_span(self, index: int) -> tuple[int, int]:
        """Where in the file the payload of the `index`-th step lies."""
        start, stop = self._payload_offset[index : index + 2].tolist()
        return self.ref.head_bytes + start, self.ref.head_bytes + stop

    def check_payload(self, index: int, payload: bytes) -> None:
        """Check a payload against its checksum.

        Raises:
            ValueError: it does not fit.
        """
        start, stop = self.payload_span(index)
        if len(payload) != stop - start or zlib.crc32(payload) != int(self.payload_crc32[index]):
            raise ValueError("the payload does not fit its checksum")

    def sample_ids(self, index: int) -> tuple[SampleId, ...]:
        """Ids of the `index`-th step."""
        start, stop = self.ids_offset[index : index + 2].tolist()
        codes = self.ids[start:stop].tolist()
        if not 0 <= start <= stop <= len(self.ids):
            raise ValueError(f"ids from {start} to {stop} of {len(self.ids)}")
        return tuple(codes if self.table is None else map(self.table.__getitem__, codes))

    def positions(self, sample_ids: Collection[SampleId]) -> npt.NDArray[np.int64]:
        """Places in `ids` that hold one of these ids, ascending."""
        if self.table is not None:
            codes = self.table.codes(sample_ids)
        else:
            bounds = np.iinfo(self.ids.dtype)
            fitting = [one for one in sample_ids if isinstance(one, int) and bounds.min <= one <= bounds.max]
            codes = np.array(fitting, np.int64)
        return np.flatnonzero(np.isin(self.ids, codes[codes >= 0] if self.table is not None else codes))

    def distinct(self, positions: npt.NDArray[np.int64] | slice) -> list[SampleId]:
        """The different ids at these places."""
        codes = np.unique(self.ids[positions]).tolist()
        return codes if self.table is None else [self.table[code] for code in codes]

    def step(self, index: int, payload: bytes = b"") -> EncodedStep:
        """The `index`-th step, around a payload that was read already."""
        start, stop = self._entry_offset[index : index + 2].tolist()
        return EncodedStep(
            optimizer=int(self.optimizer[index]),
            sample_ids=self.sample_ids(index),
            batch_size=int(self.batch_size[index]),
            seconds=float(self.seconds[index]),
            status=StepStatus(int(self.status[index])),
            entries=self.entries[start:stop],
            payload=payload,
        )

    def check_record(self, index: int) -> None:
        """Check columns, ids and entries of a step against its checksum; needed only where the head is damaged.

        Raises:
            ValueError: they do not fit.
        """
        crc = record_crc(self.ref.start + index, self.step(index), int(self.payload_crc32[index]))
        if crc != int(self._record_crc32[index]):
            raise ValueError("the record does not fit its checksum")
