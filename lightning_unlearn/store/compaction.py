"""Few segments instead of many small ones: which neighbours to merge, and merging them.

Recordings that flush often (small models, frequent checkpoints) publish many small segments. The policy merges
neighbours so that their number stays logarithmic in the number of publications, and so that every merge puts a step
into a segment several times as large: a step is written anew a logarithmic number of times.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightning_unlearn.store.commits import CommitLog
from lightning_unlearn.store.id_index import Ids
from lightning_unlearn.store.key_table import KeyTable, id_text
from lightning_unlearn.store.opening import corrupted
from lightning_unlearn.store.rewrite import checked_steps, whole_segment
from lightning_unlearn.store.segment import STEP_COLUMNS, Content, SegmentRef, narrow_ids, write_content
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.file_views import DAMAGE
from lightning_unlearn.utilities.files import Files

__all__ = ["compact", "merge_segments", "mergeable_neighbours", "segments_to_merge"]

_FANOUT = 8
_GROWTH = 4
_MOST_MAPPED = 64  # files that a merge keeps open: a process may have no more than a few hundred


def segments_to_merge(refs: Sequence[SegmentRef], segment_bytes: int) -> slice | None:
    """The run of neighbours that is worth a merge now, or `None`; for use after each publication.

    A run has at least 8 segments and at least 4 times the bytes of its largest one, so a step is written anew at most
    log4(segment_bytes / bytes of the first publication) times. The newest such run is taken, and the shortest there.

    Args:
        refs: A rank's segments, in order.
        segment_bytes: Bound on the size of the merged segment.

    >>> def refs(*sizes): return [SegmentRef(f"s{i}", i, i + 1, size, 0, "") for i, size in enumerate(sizes)]
    >>> segments_to_merge(refs(*[100] * 7), 10_000)
    >>> segments_to_merge(refs(5000, *[100] * 8), 10_000)
    slice(1, 9, None)
    """
    for stop in range(len(refs), _FANOUT - 1, -1):
        total = largest = 0
        for start in range(stop - 1, -1, -1):
            total += refs[start].bytes
            largest = max(largest, refs[start].bytes)
            if total > segment_bytes:
                break
            if stop - start >= _FANOUT and total >= _GROWTH * largest:
                return slice(start, stop)
    return None


def mergeable_neighbours(refs: Sequence[SegmentRef], segment_bytes: int) -> slice | None:
    """The first run of at least two neighbours that fit into one segment, as long as possible, or `None`.

    For a compaction on request: merging such runs until there is none leaves no two neighbours that fit together.

    >>> def refs(*sizes): return [SegmentRef(f"s{i}", i, i + 1, size, 0, "") for i, size in enumerate(sizes)]
    >>> mergeable_neighbours(refs(900, 200, 300, 400, 200), 1000)
    slice(1, 4, None)
    """
    for start in range(len(refs) - 1):
        stop, total = start, 0
        while stop < len(refs) and total + refs[stop].bytes <= segment_bytes:
            total += refs[stop].bytes
            stop += 1
        if stop - start >= 2:
            return slice(start, stop)
    return None


def _recoded(contents: Sequence[Content]) -> tuple[Ids, KeyTable | None]:
    """Ids of all parts, one after the other, as places in one key table where one of the parts has one."""
    if all(content.table is None for content in contents):
        return narrow_ids(np.concatenate([content.ids for content in contents], dtype=np.int64)), None
    parts: list[tuple[list[bytes], npt.NDArray[np.signedinteger]]] = []
    for content in contents:
        if content.table is None:
            distinct, places = np.unique(content.ids, return_inverse=True)
            parts.append(([id_text(one) for one in distinct.tolist()], places))
        else:
            parts.append(([content.table.key(code) for code in range(len(content.table))], content.ids))
    table = KeyTable.of_texts({text for texts, _ in parts for text in texts})
    code_of = {table.key(code): code for code in range(len(table))}
    codes = [np.array([code_of[text] for text in texts], np.int64)[places] for texts, places in parts]
    return narrow_ids(np.concatenate(codes)), table


def _joined(contents: Sequence[Content]) -> Content:
    ids, table = _recoded(contents)
    return Content(
        {name: np.concatenate([content.columns[name] for content in contents]) for name in STEP_COLUMNS},
        np.concatenate([content.ids_count for content in contents]),
        np.concatenate([content.entry_count for content in contents]),
        np.concatenate([content.payload_count for content in contents]),
        ids,
        table,
        b"".join([content.entries for content in contents]),
    )


def merge_segments(files: Files, log: CommitLog, store_id: str, refs: Sequence[SegmentRef]) -> SegmentRef:
    """Publish one segment with the steps of adjoining ones; it is not live before a commit lists it in their place.

    Every record and every payload is checked on the way, and goes into the new file as it is. Local payloads are
    copied from file to file, but for segments of less than a 64th of the result, which are read into memory;
    elsewhere at most the merged segment is in memory, twice as it is put together.

    Raises:
        StoreCorruptedError: one of them is damaged; nothing was published.
        ValueError: they do not adjoin each other, or were compressed in different ways.
    """
    if not refs or any(left.stop != right.start for left, right in itertools.pairwise(refs)):
        spans = [(ref.start, ref.stop) for ref in refs]
        raise ValueError(expected("refs", "adjoining segments", spans, "Merge neighbours only."))
    small = sum(ref.bytes for ref in refs) // _MOST_MAPPED
    segments = [whole_segment(files, log.directory, ref, mapped=ref.bytes > small) for ref in refs]
    # a segment without payload, such as what is left of a damaged one, fits to any compression
    compressions = {segment.compression for segment in segments if segment.ref.payload_bytes}
    if len(compressions) > 1:
        raise ValueError(expected("refs", "segments of one compression", compressions, "Merge neighbours only."))
    for segment in segments:
        for _ in checked_steps(segment, log.directory):
            pass
    try:
        content = _joined([segment.content() for segment in segments])
        payload = [segment.all_payload() for segment in segments]
    except DAMAGE as error:  # a key that no step uses
        raise corrupted(f"{log.directory}/{refs[0].name}", range(refs[0].start, refs[-1].stop), error) from error
    ref, chunks = write_content(
        content,
        payload,
        name=log.segment_name(),
        start=refs[0].start,
        rank=log.rank,
        store_id=store_id,
        compression=compressions.pop() if compressions else segments[0].compression,
    )
    log.publish_segment(ref, chunks)
    return ref


def compact(files: Files, store_id: str, world_size: int, segment_bytes: int) -> int:
    """Merge neighbours, over all ranks, until no two of them fit into one segment.

    Each merge is a commit of its own: what an interruption leaves is a store that is partly compacted, and the disk
    holds at most one segment twice. Where nothing fits together, nothing is written but a commit.

    Returns:
        Number of segments that became part of larger ones.

    Raises:
        StoreMismatchError: a writer is open.
        StoreCorruptedError: a segment is damaged; repair the store first.
    """
    count = 0
    for rank in range(world_size):
        log = CommitLog(files, store_id, rank)
        try:
            while (run := mergeable_neighbours(log.head.segments, segment_bytes)) is not None:
                refs = log.head.segments
                merged = merge_segments(files, log, store_id, refs[run])
                log.commit((*refs[: run.start], merged, *refs[run.stop :]))
                log.clean()
                count += run.stop - run.start
        finally:
            log.release()
    return count
