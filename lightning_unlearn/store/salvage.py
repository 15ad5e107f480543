"""What can be saved from a damaged file, and from a directory whose commit is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.store.commits import Commit, CommitLog, commit_numbers, rank_directory
from lightning_unlearn.store.documents import digest_of
from lightning_unlearn.store.opening import open_segment, whole_file
from lightning_unlearn.store.records import ENTRY, UNKNOWN_OPTIMIZER, EncodedStep
from lightning_unlearn.store.rewrite import drop_delta, write_segment
from lightning_unlearn.store.segment import SegmentRef, read_header
from lightning_unlearn.store.segment_reader import Segment
from lightning_unlearn.store.version1 import VERSION_1
from lightning_unlearn.types import SampleId, StepStatus
from lightning_unlearn.utilities.file_views import DAMAGE
from lightning_unlearn.utilities.files import Files

__all__ = ["Damages", "damages_of", "open_damaged", "salvage_commit", "salvage_segment", "salvage_steps"]

_GONE = EncodedStep(UNKNOWN_OPTIMIZER, (), 0, 0.0, StepStatus.LOST, np.empty(0, ENTRY), b"")


@dataclass(slots=True)
class Damages:
    """What is wrong with one segment.

    Attributes:
        parts: Names of the damaged parts: `"head"`, `"ids"`, `"layers"`, `"deltas"`, `"key table"`, `"id index"`.
        steps: Steps that lose their delta.
        lost_ids: Steps that lose their ids as well.
    """

    parts: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    lost_ids: list[int] = field(default_factory=list)


def open_damaged(files: Files, directory: str, ref: SegmentRef) -> tuple[Segment | None, bool]:
    """A segment that may be damaged, and whether its head is intact; `None` where the head cannot be made sense of.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read now.
    """
    read = whole_file(files, f"{directory}/{ref.name}")
    try:
        head = read(0, ref.head_bytes)
        return open_segment(ref, head, read, check=False), digest_of(head) == ref.digest
    except (*DAMAGE, StoreMismatchError):
        return None, False


def _ids_by_index(segment: Segment) -> Callable[[int], tuple[SampleId, ...]]:
    """Ids of a step as the index tells them, ascending; raises `ValueError` or `EOFError` where it is damaged."""

    @lru_cache(maxsize=1)
    def occurrences() -> tuple[np.ndarray, np.ndarray]:
        pieces = list(segment.lookup.index().scan())
        ids = np.concatenate([ids for ids, _ in pieces]) if pieces else np.empty(0, np.int64)
        steps = np.concatenate([steps for _, steps in pieces]) if pieces else np.empty(0, np.int32)
        order = np.argsort(steps, kind="stable")
        return ids[order].astype(np.int64), steps[order]

    def look_up(index: int) -> tuple[SampleId, ...]:
        ids, steps = occurrences()
        start, stop = np.searchsorted(steps, [index, index + 1])
        return tuple(segment.lookup.decode(ids[start:stop]))

    return look_up


def salvage_steps(segment: Segment, intact_head: bool) -> Iterator[tuple[EncodedStep | None, str]]:
    """Every step of a segment, one at a time, and the name of its damaged part, if any.

    A step is intact, or without its delta, or `None` where its ids are lost as well. Where the head is intact the index
    knows the ids a second time: what is damaged can be told, and ids that are damaged are taken from there.
    """
    by_index = _ids_by_index(segment)
    for index in range(segment.n_steps):
        try:
            step = segment.step(index)
        except (*DAMAGE, OverflowError):
            if not intact_head:
                yield None, "head"
                continue
            try:
                ids = by_index(index)
                bare = segment.without_delta(index, ids)
            except DAMAGE:
                yield None, "ids"
                continue
            status = StepStatus.LOST if bare.status is StepStatus.STORED else bare.status
            yield replace(bare, status=status), "layers" if _same_ids(segment, index, ids) else "ids"
            continue
        try:
            yield replace(step, payload=segment.payload(index)), ""
        except DAMAGE:
            yield drop_delta(step, StepStatus.LOST), "deltas"


def _same_ids(segment: Segment, index: int, ids: tuple[SampleId, ...]) -> bool:
    try:
        codes = np.sort(segment.codes(index)).astype(np.int64)
        return segment.lookup.decode(codes) == list(ids)
    except DAMAGE:
        return False


def damages_of(segment: Segment | None, intact_head: bool, ref: SegmentRef) -> Damages:
    """What is damaged in a segment, read step by step."""
    if segment is None:
        every = list(range(ref.start, ref.stop))
        return Damages(["head"], every, every)
    found = Damages(([] if intact_head else ["head"]) + list(segment.damaged_parts()))
    for index, (step, part) in enumerate(salvage_steps(segment, intact_head)):
        if part and part not in found.parts:
            found.parts.append(part)
        if part and (step is None or step.status is StepStatus.LOST):
            found.steps.append(ref.start + index)
        if step is None:
            found.lost_ids.append(ref.start + index)
    return found


def salvage_segment(files: Files, log: CommitLog, store_id: str, ref: SegmentRef) -> SegmentRef:
    """Publish what is left of a damaged segment; steps keep their places, with status `LOST`, and the index is new.

    Raises:
        OSError: it is there, and cannot be read now.
    """
    try:
        segment, intact = open_damaged(files, log.directory, ref)
    except FileNotFoundError:
        segment, intact = None, False
    if segment is None:
        return write_segment(log, store_id, ref.start, [_GONE] * (ref.stop - ref.start), None)
    steps = [_GONE if step is None else step for step, _ in salvage_steps(segment, intact)]
    return write_segment(log, store_id, ref.start, steps, segment.compression)


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
            except (ValueError, KeyError, TypeError, IndexError, OSError):
                return None
    refs.sort(key=lambda ref: ref.start)
    stops = [0, *(ref.stop for ref in refs)]
    if not refs or [ref.start for ref in refs] != stops[:-1]:
        return None
    return Commit(max(commit_numbers(names), default=0), tuple(refs))


def _describe(files: Files, directory: str, name: str, store_id: str, rank: int) -> SegmentRef:
    size = files.size(f"{directory}/{name}")
    (length,) = np.frombuffer(files.read(f"{directory}/{name}", 0, 8), "<u8").tolist()
    header, first = read_header(files.read(f"{directory}/{name}", 0, min(8 + length, size)))
    metadata = header["__metadata__"]
    if (metadata["store_id"], metadata["rank"]) != (store_id, str(rank)):
        raise ValueError("a segment of another store or rank")
    start, count = int(metadata["start"]), int(header["status"]["shape"][0])
    behind_head = {"payload"} if int(metadata["version"]) == VERSION_1 else {"key.offset", "ids"}
    head_bytes = first + min(int(header[name]["data_offsets"][0]) for name in behind_head & set(header))
    payload, stop = (first + int(offset) for offset in header["payload"]["data_offsets"])
    if stop != size:
        raise ValueError("a segment that was cut")
    digest = digest_of(files.read(f"{directory}/{name}", 0, head_bytes))
    ref = SegmentRef(name, start, start + count, size, head_bytes, digest, payload - head_bytes)
    segment, _ = open_damaged(files, directory, ref)
    if segment is None or any(step is None for step, _ in salvage_steps(segment, intact_head=False)):
        raise ValueError("a segment whose records do not fit their checksums")
    return ref
