"""Few segments instead of many small ones: which neighbours to merge, and merging them.

Recordings that flush often (small models, frequent checkpoints) publish many small segments. The policy merges
neighbours so that their number stays logarithmic in the number of publications, and so that every merge puts a step
into a segment several times as large: a step is written anew a logarithmic number of times.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lightning_unlearn.store.commits import CommitLog
from lightning_unlearn.store.rewrite import read_steps, write_segment
from lightning_unlearn.store.segment import SegmentRef
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.files import Files

__all__ = ["merge_segments", "mergeable_neighbours", "segments_to_merge"]

_FANOUT = 8
_GROWTH = 4


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


def merge_segments(files: Files, log: CommitLog, store_id: str, refs: Sequence[SegmentRef]) -> SegmentRef:
    """Publish one segment with the steps of adjoining ones; it is not live before a commit lists it in their place.

    Every checksum is checked on the way. At most the merged segment is in memory.

    Raises:
        StoreCorruptedError: one of them is damaged; nothing was published.
        ValueError: they do not adjoin each other, or were compressed in different ways.
    """
    if not refs or any(left.stop != right.start for left, right in itertools.pairwise(refs)):
        spans = [(ref.start, ref.stop) for ref in refs]
        raise ValueError(expected("refs", "adjoining segments", spans, "Merge neighbours only."))
    parts = [read_steps(files, log.directory, ref) for ref in refs]
    steps = [step for _, part in parts for step in part]
    # a segment without payload, such as what is left of a damaged one, fits to any compression
    compressions = {segment.compression for segment, part in parts if any(step.payload for step in part)}
    if len(compressions) > 1:
        raise ValueError(expected("refs", "segments of one compression", compressions, "Merge neighbours only."))
    compression = compressions.pop() if compressions else parts[0][0].compression
    return write_segment(log, store_id, refs[0].start, steps, compression)
