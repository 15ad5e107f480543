"""Writing a segment anew: the only way to take something out of an immutable file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.store.commits import CommitLog
from lightning_unlearn.store.compression import Compression
from lightning_unlearn.store.documents import digest_of
from lightning_unlearn.store.opening import corrupted, open_segment, whole_file
from lightning_unlearn.store.records import ENTRY, EncodedStep
from lightning_unlearn.store.segment import SegmentRef, build_segment
from lightning_unlearn.store.segment_reader import Segment
from lightning_unlearn.types import SampleId, StepStatus
from lightning_unlearn.utilities.file_views import DAMAGE
from lightning_unlearn.utilities.files import Files

__all__ = [
    "checked_steps",
    "drop_delta",
    "first_touched",
    "purge_segment",
    "read_steps",
    "rewrite_segment",
    "slice_segment",
    "whole_segment",
    "write_segment",
]


def whole_segment(files: Files, directory: str, ref: SegmentRef, *, mapped: bool = True) -> Segment:
    """A segment all of which is about to be read, its head checked; see `whole_file`.

    Raises:
        StoreCorruptedError: it is missing, or its head is damaged.
    """
    name = f"{directory}/{ref.name}"
    try:
        read = whole_file(files, name, mapped=mapped)
        head = read(0, ref.head_bytes)
        if digest_of(head) != ref.digest:
            raise ValueError("the head does not fit its checksum")
        return open_segment(ref, head, read)
    except StoreMismatchError:
        raise
    except DAMAGE as error:
        raise corrupted(name, range(ref.start, ref.stop), error) from error


def checked_steps(segment: Segment, directory: str) -> Iterator[EncodedStep]:
    """The steps of a segment, one after the other, every checksum of records and payloads checked.

    Payloads stay in the file where it is local.

    Raises:
        StoreCorruptedError: a step is damaged.
    """
    for index in range(segment.n_steps):
        try:
            step = segment.step(index, segment.payload(index))
        except DAMAGE as error:
            raise corrupted(f"{directory}/{segment.ref.name}", [segment.ref.start + index], error) from error
        yield step


def read_steps(files: Files, directory: str, ref: SegmentRef) -> tuple[Segment, list[EncodedStep]]:
    """A whole segment, every checksum of its records checked.

    Raises:
        StoreCorruptedError: it is missing, or a part does not fit its checksum.
    """
    segment = whole_segment(files, directory, ref)
    return segment, list(checked_steps(segment, directory))


def write_segment(
    log: CommitLog, store_id: str, start: int, steps: Sequence[EncodedStep], compression: Compression
) -> SegmentRef:
    """Publish a new segment; it is not live before a commit lists it."""
    ref, chunks = build_segment(
        steps, name=log.segment_name(), start=start, rank=log.rank, store_id=store_id, compression=compression
    )
    log.publish_segment(ref, chunks)
    return ref


def slice_segment(files: Files, log: CommitLog, store_id: str, ref: SegmentRef, stop: int) -> SegmentRef:
    """Publish the part of a segment before step `stop` as a new segment."""
    segment, steps = read_steps(files, log.directory, ref)
    return write_segment(log, store_id, ref.start, steps[: stop - ref.start], segment.compression)


def rewrite_segment(files: Files, log: CommitLog, store_id: str, ref: SegmentRef) -> SegmentRef:
    """Publish a segment as it is, in the current format version."""
    return slice_segment(files, log, store_id, ref, ref.stop)


def drop_delta(step: EncodedStep, status: StepStatus, without: Collection[SampleId] = ()) -> EncodedStep:
    """A step without its delta, and without some of its ids."""
    return replace(_drop_ids(step, without), status=status, entries=np.empty(0, ENTRY), payload=b"")


def _drop_ids(step: EncodedStep, without: Collection[SampleId]) -> EncodedStep:
    if not without:
        return step
    return replace(step, sample_ids=tuple(sample_id for sample_id in step.sample_ids if sample_id not in without))


def first_touched(segment: Segment, sample_ids: Collection[SampleId], steps: Collection[int]) -> int | None:
    """The first step that holds one of the ids, or is one of the steps and has a delta; `None` without any.

    Raises:
        ValueError, EOFError, FileNotFoundError: the id index is damaged or missing.
    """
    start, stop = segment.ref.start, segment.ref.stop
    found = {start + int(index) for index in segment.lookup.occurrences(sample_ids)[1]}
    found.update(step for step in steps if start <= step < stop and segment.status[step - start] == StepStatus.STORED)
    return min(found, default=None)


def purge_segment(
    files: Files,
    log: CommitLog,
    store_id: str,
    ref: SegmentRef,
    sample_ids: Collection[SampleId],
    steps: Collection[int],
) -> SegmentRef:
    """Publish a segment without these ids in any step and without the deltas of these steps."""
    segment, old = read_steps(files, log.directory, ref)
    new = [
        drop_delta(step, StepStatus.PURGED, sample_ids)
        if ref.start + index in steps and step.status is StepStatus.STORED
        else _drop_ids(step, sample_ids)
        for index, step in enumerate(old)
    ]
    return write_segment(log, store_id, ref.start, new, segment.compression)
