"""Writing one immutable safetensors file that holds many steps.

Three parts, in the order in which a reader needs them: the *head* with one number per step and column, which is all
that is read when a store is opened; then ids, the index from ids to steps, and the descriptions of the layers, which
are read in slices; then the payload of all steps. The commit that lists a segment holds the head's digest, and the
head holds checksums of everything else: no byte is outside a checksum.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_unlearn.store.compression import Compression
from lightning_unlearn.store.documents import FORMAT_VERSION, digest_of
from lightning_unlearn.store.id_index import Ids, index_columns
from lightning_unlearn.store.key_table import KeyTable, fits_int64
from lightning_unlearn.store.records import EncodedStep, ids_bytes, record_crc, record_numbers
from lightning_unlearn.utilities.file_views import Raw

__all__ = [
    "HEAD_COLUMNS",
    "NUMPY",
    "STEP_COLUMNS",
    "Content",
    "SegmentRef",
    "build_segment",
    "content_of",
    "narrow_ids",
    "read_header",
    "write_content",
]

_DTYPES: dict[str, str] = {"<f8": "F64", "<i8": "I64", "<f4": "F32", "<i4": "I32", "<u4": "U32", "|u1": "U8"}
NUMPY: Mapping[str, np.dtype[Any]] = {name: np.dtype(code) for code, name in _DTYPES.items()}
"""Dtype of a tensor by its name in safetensors."""

STEP_COLUMNS: Mapping[str, str] = {
    "seconds": "<f8",
    "batch_size": "<i8",
    "kept": "<i8",
    "optimizer": "<i4",
    "record_crc32": "<u4",
    "payload_crc32": "<u4",
    "pruning_error": "<f4",
    "rounding_error": "<f4",
    "status": "|u1",
    "edited": "|u1",
}
"""Columns with one number per step, and their dtypes."""

HEAD_COLUMNS = ("ids_offset", "entry_offset", "payload_offset", *STEP_COLUMNS, "index.fence", "index.crc32")
"""Tensors of every head; `key.crc32` joins them where there is a key table."""

_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """What a commit says of one segment.

    Attributes:
        name: File name in the rank's directory.
        start: First step.
        stop: One behind the last step.
        bytes: Size of the file.
        head_bytes: Size of the head.
        digest: BLAKE2b of the head.
        body_bytes: Size of ids, index and descriptions of layers, between the head and the payload.
    """

    name: str
    start: int
    stop: int
    bytes: int
    head_bytes: int
    digest: str
    body_bytes: int = 0

    @property
    def payload_bytes(self) -> int:
        """Size of the deltas.

        >>> SegmentRef("s", 0, 4, 1000, 100, "", 50).payload_bytes
        850
        """
        return self.bytes - self.head_bytes - self.body_bytes


@dataclass(frozen=True, slots=True)
class Content:
    """Everything about the steps of a segment but their payload.

    Attributes:
        columns: The `STEP_COLUMNS`.
        ids_count: Number of ids of each step.
        entry_count: Number of layers of each step.
        payload_count: Number of bytes of payload of each step.
        ids: Ids, or their codes in `table`, of all steps, one after the other.
        table: The key table, where an id is no 64-bit integer.
        entries: Packed `ENTRY` of all steps, one after the other.
    """

    columns: Mapping[str, npt.NDArray[Any]]
    ids_count: npt.NDArray[np.int64]
    entry_count: npt.NDArray[np.int64]
    payload_count: npt.NDArray[np.int64]
    ids: Ids
    table: KeyTable | None
    entries: Raw


def narrow_ids(ids: npt.NDArray[np.int64]) -> Ids:
    """Ids as 32-bit integers where they all fit.

    >>> narrow_ids(np.array([3, -1])).dtype, narrow_ids(np.array([2**31])).dtype
    (dtype('int32'), dtype('int64'))
    """
    small = not ids.size or (ids.min() >= _INT32.min and ids.max() <= _INT32.max)
    return ids.astype("<i4") if small else ids.astype("<i8")


def content_of(steps: Sequence[EncodedStep], start: int) -> Content:
    """The columns of some steps, the first of which is step `start` of the store."""
    flat = list(chain.from_iterable(step.sample_ids for step in steps))
    table, codes = None, flat
    if not fits_int64(flat):
        table = KeyTable.of(flat)
        lookup = {table[code]: code for code in range(len(table))}
        codes = [lookup[sample_id] for sample_id in flat]
    entries = [step.entries.tobytes() for step in steps]
    payload_crcs = [zlib.crc32(step.payload) for step in steps]
    record_crcs = [
        record_crc(record_numbers(start + i, step), ids_bytes(step.sample_ids), entries[i], payload_crcs[i])
        for i, step in enumerate(steps)
    ]
    rows: dict[str, list[Any]] = {
        "seconds": [step.seconds for step in steps],
        "batch_size": [step.batch_size for step in steps],
        "kept": [int(step.entries["kept"].sum()) for step in steps],
        "optimizer": [step.optimizer for step in steps],
        "record_crc32": record_crcs,
        "payload_crc32": payload_crcs,
        "pruning_error": [step.pruning_error for step in steps],
        "rounding_error": [step.rounding_error for step in steps],
        "status": [step.status for step in steps],
        "edited": [step.edited for step in steps],
    }
    return Content(
        {name: np.array(rows[name], dtype) for name, dtype in STEP_COLUMNS.items()},
        np.array([len(step.sample_ids) for step in steps], np.int64),
        np.array([len(step.entries) for step in steps], np.int64),
        np.array([len(step.payload) for step in steps], np.int64),
        narrow_ids(np.array(codes, np.int64)),
        table,
        b"".join(entries),
    )


def _offsets(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(counts))).astype("<i8")


def write_content(
    content: Content,
    payload: Sequence[Raw],
    *,
    name: str,
    start: int,
    rank: int,
    store_id: str,
    compression: Compression,
) -> tuple[SegmentRef, list[Raw]]:
    """The file that holds some steps, in pieces, and what the commit has to say of it.

    Args:
        content: Everything about the steps but their payload.
        payload: The payload of all steps, in any number of pieces.
        name: File name.
        start: First step.
        rank: The rank it belongs to.
        store_id: The store it belongs to.
        compression: How the payload was compressed.
    """
    index = index_columns(content.ids, content.ids_count)
    head: dict[str, npt.NDArray[Any]] = {
        "ids_offset": _offsets(content.ids_count),
        "entry_offset": _offsets(content.entry_count),
        "payload_offset": _offsets(content.payload_count),
        "index.fence": index.fences,
        **content.columns,
        "index.crc32": index.crc32,
    }
    body: dict[str, npt.NDArray[Any]] = {"ids": content.ids, "index.ids": index.ids, "index.steps": index.steps}
    if content.table is not None:
        head["key.crc32"] = content.table.block_crcs()
        body = {"key.offset": content.table.offsets.astype("<i8"), **body}
        body["key.text"] = np.frombuffer(content.table.text, np.uint8)
    body["entries"] = np.frombuffer(content.entries, np.uint8)
    columns = dict(sorted(head.items(), key=lambda item: -item[1].itemsize))
    columns["padding"] = np.zeros(-sum(column.nbytes for column in head.values()) % 8, np.uint8)
    head_tensors = len(columns)
    columns |= body
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "lightning-unlearn/segment",
            "version": str(FORMAT_VERSION),
            "store_id": store_id,
            "rank": str(rank),
            "start": str(start),
            "compression": compression or "none",
        }
    }
    position, parts = 0, []
    for tensor, column in columns.items():
        data = column.tobytes()
        offsets = [position, position + len(data)]
        header[tensor] = {"dtype": _DTYPES[column.dtype.str], "shape": [len(column)], "data_offsets": offsets}
        position += len(data)
        parts.append(data)
    size = int(content.payload_count.sum())
    header["payload"] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    top = b"".join([struct.pack("<Q", len(text)), text, *parts[:head_tensors]])
    rest = parts[head_tensors:]
    body_bytes = sum(map(len, rest))
    total = len(top) + body_bytes + size
    stop = start + len(content.ids_count)
    ref = SegmentRef(name, start, stop, total, len(top), digest_of(top), body_bytes)
    return ref, [top, *rest, *payload]


def build_segment(
    steps: Sequence[EncodedStep], *, name: str, start: int, rank: int, store_id: str, compression: Compression
) -> tuple[SegmentRef, list[Raw]]:
    """The file that holds `steps`, in pieces, and what the commit has to say of it."""
    payloads = [step.payload for step in steps]
    content = content_of(steps, start)
    return write_content(
        content, payloads, name=name, start=start, rank=rank, store_id=store_id, compression=compression
    )


def read_header(data: Raw) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and where the tensors begin.

    Raises:
        ValueError: it is not one.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(bytes(data[8 : 8 + length]))
    except struct.error as error:
        raise ValueError(f"no header ({error})") from error
    if not isinstance(header, dict):
        raise ValueError("a header that is no JSON object")
    return header, 8 + length
