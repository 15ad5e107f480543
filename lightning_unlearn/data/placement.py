"""Into which batches a subject's rows go: as few as possible, without ever dominating one."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from lightning_unlearn.utilities.checks import expected

__all__ = ["batch_caps", "place_subjects"]


def batch_caps(sizes: Sequence[int], max_share: float) -> list[int]:
    """Most rows of one subject in batches of these sizes: `floor(max_share * size)`, or one row where that is none.

    >>> batch_caps([8, 8, 1], 0.5)
    [4, 4, 1]
    """
    share = Fraction(repr(float(max_share)))  # the decimal number, as 0.29 * 100 is below 29 in floats
    return [max(1, math.floor(share * size)) if size else 0 for size in sizes]


class _Placement:
    """Rows of each subject in each batch, with the two bounds that must hold."""

    def __init__(self, sizes: Sequence[int], caps: Sequence[int]) -> None:
        self.caps = np.asarray(caps, dtype=np.int64)
        self.space: NDArray[np.int64] = np.asarray(sizes, dtype=np.int64).copy()
        self.rows: list[dict[int, int]] = [{} for _ in sizes]

    def add(self, subject: int, batch: int, count: int) -> None:
        self.rows[batch][subject] = self.rows[batch].get(subject, 0) + count
        self.space[batch] -= count
        if self.rows[batch][subject] == 0:
            del self.rows[batch][subject]

    def room(self, subject: int) -> NDArray[np.int64]:
        """For each batch how many more rows of the subject it can take."""
        held = np.fromiter((rows.get(subject, 0) for rows in self.rows), dtype=np.int64, count=len(self.rows))
        room: NDArray[np.int64] = np.minimum(self.space, self.caps - held)
        return room

    def make_room(self, subject: int) -> bool:
        """Place one more row of the subject by moving rows of others along the shortest chain of batches.

        This is an augmenting path of a maximum flow, so it exists whenever any placement of all rows does.
        """
        start = [b for b, rows in enumerate(self.rows) if rows.get(subject, 0) < self.caps[b]]
        came_from: dict[int, tuple[int, int] | None] = dict.fromkeys(start)
        waiting = deque(start)
        while waiting:
            batch = waiting.popleft()
            if self.space[batch] > 0:
                self._shift(subject, batch, came_from)
                return True
            for other in self.rows[batch]:
                for target, rows in enumerate(self.rows):
                    if target not in came_from and rows.get(other, 0) < self.caps[target]:
                        came_from[target] = (batch, other)
                        waiting.append(target)
        return False

    def _shift(self, subject: int, batch: int, came_from: dict[int, tuple[int, int] | None]) -> None:
        step = came_from[batch]
        while step is not None:
            previous, other = step
            self.add(other, batch, 1)
            self.add(other, previous, -1)
            batch, step = previous, came_from[previous]
        self.add(subject, batch, 1)


def place_subjects(
    counts: Sequence[int], sizes: Sequence[int], max_share: float, rng: np.random.Generator
) -> list[dict[int, int]]:
    """Spread the rows of subjects over batches.

    A subject's rows are cut into as few equal chunks as the bound allows; each chunk goes, in random order and the
    largest first, into one of the emptiest batches that can take it whole. Only where none can is it cut further.

    Args:
        counts: Number of rows of each subject.
        sizes: Number of rows of each batch; their sum is at least that of `counts`.
        max_share: Largest share of a batch that one subject may have.
        rng: Source of the order.

    Returns:
        For each batch: subject -> number of its rows there.

    Raises:
        ValueError: no placement keeps every subject within `max_share`.

    >>> placed = place_subjects([4, 2], [4, 4, 4], 0.5, np.random.default_rng(0))
    >>> sorted(subject for batch in placed for subject, count in batch.items() if count == 2)
    [0, 0, 1]
    """
    caps = batch_caps(sizes, max_share)
    placement = _Placement(sizes, caps)
    largest = max(caps, default=1)
    chunks: list[tuple[int, int]] = []
    for subject, count in enumerate(counts):
        n_chunks = -(-count // largest)
        chunks += [(subject, count // n_chunks + (index < count % n_chunks)) for index in range(n_chunks)]
    order = rng.permutation(len(chunks))
    for subject, count in sorted((chunks[index] for index in order), key=lambda chunk: -chunk[1]):
        left = count
        while left:
            room = placement.room(subject)
            fitting = room >= left
            # A second chunk of the subject in the same batch would not save a batch.
            fresh = fitting & np.fromiter((subject not in rows for rows in placement.rows), bool, len(sizes))
            candidates = np.flatnonzero(fresh if fresh.any() else fitting)
            if candidates.size == 0 and room.max(initial=0) > 0:
                candidates = np.flatnonzero(room == room.max())
            if candidates.size:
                emptiest = candidates[placement.space[candidates] == placement.space[candidates].max()]
                batch = int(rng.choice(emptiest))
                count_here = min(left, int(room[batch]))
                placement.add(subject, batch, count_here)
                left -= count_here
            elif placement.make_room(subject):
                left -= 1
            else:
                rule = "large enough for every subject's rows to find a place"
                got = f"{max_share}, with a subject of {counts[subject]} rows in {len(sizes)} batches"
                remedy = "Raise it, or leave that subject ungrouped (None)."
                raise ValueError(expected("max_share", rule, got, remedy))
    return placement.rows
