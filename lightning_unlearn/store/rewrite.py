"""Writing a segment anew: the only way to take something out of an immutable file."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from lightning_unlearn.exceptions import StoreCorruptedError
from lightning_unlearn.store.commits import CommitLog
from lightning_unlearn.store.compression import Compression
from lightning_unlearn.store.records import ENTRY, EncodedStep
from lightning_unlearn.store.segment import Segment, SegmentRef, build_segment
from lightning_unlearn.types import SampleId, StepStatus
from lightning_unlearn.utilities.files import Files

__all__ = ["corrupted", "drop_delta", "holds", "purge_segment", "read_steps", "slice_segment", "write_segment"]


def corrupted(name: str, steps: Sequence[int], problem: object) -> StoreCorruptedError:
    """The error for a damaged file: which one, the steps it costs, and what to do."""
    lost = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}" if steps else "no step"
    return StoreCorruptedError(
        f"Expected `{name}` to be intact, but got: {problem}. Affected: {lost}. `lightning-unlearn store verify` lists "
        "the damage; `DeltaStore.open(url, check=False).repair()` drops what is damaged and keeps the rest."
    )


def read_steps(files: Files, directory: str, ref: SegmentRef) -> tuple[Segment, list[EncodedStep]]:
    """A whole segment, every checksum checked.

    Raises:
        StoreCorruptedError: it is missing, or a part does not fit its checksum.
    """
    name, steps = f"{directory}/{ref.name}", []
    try:
        data = files.read(name)
        segment = Segment(ref, data[: ref.head_bytes])
        for index in range(segment.n_steps):
            start, stop = segment.payload_span(index)
            segment.check_record(index)
            segment.check_payload(index, data[start:stop])
            steps.append(segment.step(index, data[start:stop]))
    except (ValueError, OSError) as error:
        raise corrupted(name, range(ref.start, ref.stop), error) from error
    return segment, steps


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


def drop_delta(step: EncodedStep, status: StepStatus, without: Collection[SampleId] = ()) -> EncodedStep:
    """A step without its delta, and without some of its ids."""
    ids = tuple(sample_id for sample_id in step.sample_ids if sample_id not in without)
    empty = np.empty(0, ENTRY)
    return EncodedStep(step.optimizer, ids, step.batch_size, step.seconds, status, empty, b"")


def _drop_ids(step: EncodedStep, without: Collection[SampleId]) -> EncodedStep:
    ids = tuple(sample_id for sample_id in step.sample_ids if sample_id not in without)
    return EncodedStep(step.optimizer, ids, step.batch_size, step.seconds, step.status, step.entries, step.payload)


def holds(segment: Segment, sample_ids: Collection[SampleId], steps: Collection[int]) -> bool:
    """Whether a segment holds one of the ids, or the delta of one of the steps."""
    if segment.positions(sample_ids).size:
        return True
    return any(
        segment.ref.start <= step < segment.ref.stop and segment.status[step - segment.ref.start] == StepStatus.STORED
        for step in steps
    )


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
