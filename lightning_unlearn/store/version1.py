"""All that is known of segments of format version 1; delete this file, and its mentions, to drop their support.

Version 1 had everything but the payload in its head, one tensor for each field of a layer's description, no index and
no columns for errors and edits. Such a head is turned into one of the current version in memory; the payload stays
where it is, and means the same.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_unlearn.store.key_table import KeyTable
from lightning_unlearn.store.records import (
    ENTRY,
    UNKNOWN_OPTIMIZER,
    EncodedStep,
    ids_bytes,
    record_crc,
    record_numbers,
)
from lightning_unlearn.store.segment import NUMPY, SegmentRef, content_of, read_header, write_content
from lightning_unlearn.store.segment_reader import Segment
from lightning_unlearn.store.segment_tensors import Read
from lightning_unlearn.types import SampleId, StepStatus
from lightning_unlearn.utilities.file_views import Raw

__all__ = ["VERSION_1", "segment_of_version1"]

VERSION_1 = 1

_NUMBERS = struct.Struct("<qqqdqq")
_GONE = EncodedStep(UNKNOWN_OPTIMIZER, (), 0, 0.0, StepStatus.LOST, np.empty(0, ENTRY), b"")

Columns = dict[str, npt.NDArray[Any]]


def _columns(ref: SegmentRef, head: Raw) -> tuple[dict[str, str], Columns]:
    header, first = read_header(head)
    try:
        metadata = {str(name): str(value) for name, value in header.pop("__metadata__").items()}
        del header["payload"]
        columns = {
            name: np.frombuffer(
                head[first + int(info["data_offsets"][0]) : first + int(info["data_offsets"][1])], NUMPY[info["dtype"]]
            )
            for name, info in header.items()
        }
        columns["entries"] = np.empty(len(columns["entry.layer"]), ENTRY)
        for field in ENTRY.names or ():
            columns["entries"][field] = columns[f"entry.{field}"]
        n_steps = ref.stop - ref.start
        rows = ("optimizer", "batch_size", "seconds", "status", "record_crc32", "payload_crc32")
        offsets = ("payload_offset", "entry_offset", "ids_offset")
        lengths = {len(columns[name]) for name in rows} | {len(columns[name]) - 1 for name in offsets}
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"unreadable head ({error!r})") from error
    if lengths != {n_steps}:
        raise ValueError(f"columns of another length than {n_steps} steps")
    return metadata, columns


def _step(columns: Columns, table: KeyTable | None, ordinal: int, index: int) -> EncodedStep:
    first, last = columns["ids_offset"][index : index + 2].tolist()
    start, stop = columns["entry_offset"][index : index + 2].tolist()
    if not (0 <= first <= last <= len(columns["ids"]) and 0 <= start <= stop <= len(columns["entries"])):
        raise ValueError("a record outside its columns")
    codes = columns["ids"][first:last].tolist()
    ids: tuple[SampleId, ...] = tuple(codes if table is None else map(table.__getitem__, codes))
    optimizer, batch_size, seconds, status = (
        columns[name][index].item() for name in ("optimizer", "batch_size", "seconds", "status")
    )
    step = EncodedStep(optimizer, ids, batch_size, seconds, StepStatus(status), columns["entries"][start:stop], b"")
    numbers = _NUMBERS.pack(ordinal, optimizer, batch_size, seconds, status, len(ids))
    crc = record_crc(numbers, ids_bytes(ids), step.entries.tobytes(), int(columns["payload_crc32"][index]))
    if crc != int(columns["record_crc32"][index]):
        raise ValueError("the record does not fit its checksum")
    return step


class _Either:
    """Reads what was made in memory, and the payload behind it from the file."""

    def __init__(self, memory: bytes, read: Read, shift: int) -> None:
        self._memory = memory
        self._read = read
        self._shift = shift

    def __call__(self, start: int, stop: int) -> Raw:
        if stop <= len(self._memory):
            return memoryview(self._memory)[start:stop]
        return self._read(start + self._shift, stop + self._shift)


def segment_of_version1(ref: SegmentRef, head: Raw, read: Read) -> Segment:
    """A segment of version 1, as one of the current version.

    Records that do not fit their checksums of version 1 do not fit those of the current version either.

    Args:
        ref: What the commit says of it.
        head: The first `ref.head_bytes` bytes of the file.
        read: Reads from the file.

    Raises:
        ValueError: the head cannot be read, or holds another number of steps.
    """
    metadata, columns = _columns(ref, head)
    table = KeyTable(columns["key_offset"], columns["key_text"].tobytes()) if "key_offset" in columns else None
    steps: list[EncodedStep] = []
    spoilt = np.zeros(ref.stop - ref.start, np.uint32)
    for index in range(len(spoilt)):
        try:
            steps.append(_step(columns, table, ref.start + index, index))
        except ValueError:
            steps.append(_GONE)
            spoilt[index] = 1
    content = content_of(steps, ref.start)
    payload_crcs = columns["payload_crc32"].tolist()
    record_crcs = [
        record_crc(
            record_numbers(ref.start + index, step), ids_bytes(step.sample_ids), step.entries.tobytes(), payload_crc
        )
        for index, (step, payload_crc) in enumerate(zip(steps, payload_crcs, strict=True))
    ]
    content = replace(
        content,
        columns={
            **content.columns,
            "payload_crc32": columns["payload_crc32"],
            "record_crc32": np.array(record_crcs, "<u4") ^ spoilt,
        },
        payload_count=np.diff(columns["payload_offset"]),
    )
    shown, chunks = write_content(
        content,
        [],
        name=ref.name,
        start=ref.start,
        rank=int(metadata.get("rank", "0")),
        store_id=metadata.get("store_id", ""),
        compression="zstd" if metadata.get("compression") == "zstd" else None,
    )
    memory = b"".join(chunks)
    read_either = _Either(memory, read, ref.head_bytes - len(memory))
    segment = Segment(shown, memory[: shown.head_bytes], read_either)
    segment.version = VERSION_1
    return segment
