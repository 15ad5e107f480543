"""What can be saved from a damaged file, and from a directory whose commit is damaged."""

from __future__ import annotations

import struct

import numpy as np

from lightning_unlearn.store.commits import Commit, CommitLog, commit_numbers, rank_directory
from lightning_unlearn.store.documents import digest_of
from lightning_unlearn.store.records import ENTRY, UNKNOWN_OPTIMIZER, EncodedStep
from lightning_unlearn.store.rewrite import drop_delta, write_segment
from lightning_unlearn.store.segment import Segment, SegmentRef, read_header
from lightning_unlearn.types import StepStatus
from lightning_unlearn.utilities.files import Files

__all__ = ["salvage_commit", "salvage_segment", "salvage_steps"]


def salvage_steps(data: bytes, ref: SegmentRef) -> list[EncodedStep | None]:
    """Every step of a file that is not whole: intact, without its delta, or `None` where the ids are lost as well."""
    try:
        segment = Segment(ref, data[: ref.head_bytes])
    except ValueError:
        return [None] * (ref.stop - ref.start)
    steps: list[EncodedStep | None] = []
    for index in range(segment.n_steps):
        try:
            segment.check_record(index)
        except (ValueError, IndexError, OverflowError):
            steps.append(None)
            continue
        start, stop = segment.payload_span(index)
        try:
            segment.check_payload(index, data[start:stop])
            steps.append(segment.step(index, data[start:stop]))
        except ValueError:
            steps.append(drop_delta(segment.step(index), StepStatus.LOST))
    return steps


def salvage_segment(files: Files, log: CommitLog, store_id: str, ref: SegmentRef) -> SegmentRef:
    """Publish what is left of a damaged segment; steps keep their places, with status `LOST`."""
    name = f"{log.directory}/{ref.name}"
    data = files.read(name) if files.exists(name) else b""
    gone = EncodedStep(UNKNOWN_OPTIMIZER, (), 0, 0.0, StepStatus.LOST, np.empty(0, ENTRY), b"")
    try:
        compression = Segment(ref, data[: ref.head_bytes]).compression
    except ValueError:
        compression = None
    steps = [gone if step is None else step for step in salvage_steps(data, ref)]
    return write_segment(log, store_id, ref.start, steps, compression)


def salvage_commit(files: Files, store_id: str, rank: int) -> Commit | None:
    """The commit that the intact segments of a directory tell, or `None` where they do not adjoin each other.

    A segment that a crash left unlisted may be taken in: its steps are whole, and no known weights contain them.
    """
    directory = rank_directory(rank)
    names = files.names(directory)
    refs = []
    for name in names:
        if name.startswith("segment-"):
            try:
                refs.append(_describe(files, directory, name, store_id, rank))
            except (ValueError, KeyError, TypeError, IndexError, struct.error):
                return None
    refs.sort(key=lambda ref: ref.start)
    stops = [0, *(ref.stop for ref in refs)]
    if not refs or [ref.start for ref in refs] != stops[:-1]:
        return None
    return Commit(max(commit_numbers(names), default=0), tuple(refs))


def _describe(files: Files, directory: str, name: str, store_id: str, rank: int) -> SegmentRef:
    data = files.read(f"{directory}/{name}")
    header, body = read_header(data)
    metadata = header["__metadata__"]
    if (metadata["store_id"], metadata["rank"]) != (store_id, str(rank)):
        raise ValueError("a segment of another store or rank")
    start, count = int(metadata["start"]), int(header["status"]["shape"][0])
    head_bytes = body + int(header["payload"]["data_offsets"][0])
    ref = SegmentRef(name, start, start + count, len(data), head_bytes, digest_of(data[:head_bytes]))
    if body + int(header["payload"]["data_offsets"][1]) != len(data):
        raise ValueError("a segment that was cut")
    if any(step is None for step in salvage_steps(data, ref)):
        raise ValueError("a segment whose records do not fit their checksums")
    return ref
