"""Exact selection of the largest magnitudes on the CPU, in passes over pieces that stay in the cache.

A sorted sample brackets the k-th magnitude; one pass gathers everything above the bracket's lower end; the few
candidates inside the bracket decide the threshold. The sample only makes it fast. That the result is exact follows
from counts that are always checked: a bracket that missed is replaced by a threshold found by counting, and candidates
that overflow their buffer (ties, mostly) are reduced to the k best so far, which loses nothing.

A float32 without its sign bit is an int32 that orders like the magnitude; comparing those needs no care for NaN,
which like infinity sorts above every finite number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_unlearn.utilities.checks import expected

__all__ = ["Selection", "Selector"]

Float32s: TypeAlias = NDArray[np.float32]
Integers: TypeAlias = NDArray[Any]

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = 0x7F800000
_PIECE = 1 << 16
_SAMPLE = 4096
_REDUCTIONS = 4
_DIGIT_BITS = 12
_INT32_ENTRIES = 1 << 31


@dataclass(frozen=True, slots=True)
class Selection:
    """The kept entries of one layer.

    Attributes:
        positions: Ascending, int32 (int64 in a layer of 2**31 entries or more), of shape (kept,).
        values: Their values, float32 of shape (kept,).
    """

    positions: Integers
    values: Float32s


class Selector:
    """Selects on one thread; its scratch is about 1 MiB and what the largest result needs, and is reused.

    >>> Selector().select(np.float32([1, -3, 0, 3, 2]), None, 3).positions.tolist()
    [1, 3, 4]
    >>> Selector().select(np.float32([5, 6]), np.float32([5, 4]), 2).values.tolist()
    [2.0]
    """

    def __init__(self) -> None:
        self._change = np.empty(_PIECE, np.float32)
        self._bits = np.empty(_PIECE, np.int32)
        self._mask = np.empty(_PIECE, np.bool_)
        self._positions: Integers = np.empty(0, np.int32)
        self._values = np.empty(0, np.float32)

    def select(self, after: Float32s, before: Float32s | None, k: int) -> Selection:
        """The `k` largest magnitudes of `after - before`; of equal ones the lowest position wins; never a zero.

        Args:
            after: Contiguous float32 of shape (n,).
            before: What to subtract, of the same kind, or `None` for nothing. Neither is changed.
            k: How many to keep, from 1 to n; fewer come back where fewer are not zero.

        Raises:
            ValueError: an entry is not finite.
        """
        with np.errstate(all="ignore"):
            if after.size <= _SAMPLE:
                return self._select_small(after, before, k)
            floor, ceiling = self._bracket(after, before, k)
            count = self._candidates(after, before, k, floor)
            if count is None or (count < k and floor > 1):
                floor = ceiling = max(1, self._threshold(after, before, k))
                count = self._candidates(after, before, k, floor, reductions=after.size) or 0
            magnitudes = self._values[:count].view(np.int32) & _MAGNITUDE
            # What is not finite is larger than all that is finite, so it cannot hide below the candidates.
            if count and int(magnitudes.max()) >= _INFINITY:
                raise ValueError(self._not_finite(after, before))
            if count <= k:
                return Selection(self._positions[:count].copy(), self._values[:count].copy())
            chosen, _ = _strongest(magnitudes, k, ceiling)
            return Selection(self._positions.take(chosen), self._values.take(chosen))

    def _select_small(self, after: Float32s, before: Float32s | None, k: int) -> Selection:
        """Without a sample, which would be the whole layer; what is left is mostly the price of a call."""
        change = after if before is None else after - before
        bits = change.view(np.int32) & _MAGNITUDE
        if int(bits.max()) >= _INFINITY:
            raise ValueError(self._not_finite(after, before))
        floor = int(np.partition(bits, bits.size - k)[bits.size - k])
        found = (bits >= max(floor, 1)).nonzero()[0]
        excess = found.size - k
        if excess > 0:  # of those that equal the weakest, the last ones are too many
            found = np.delete(found, (bits.take(found) == floor).nonzero()[0][-excess:])
        return Selection(found.astype(np.int32), change.take(found))

    def squares(self, after: Float32s, before: Float32s | None, positions: Integers) -> tuple[float, float]:
        """Sum of squares of `after - before` without the entries at `positions`, and with them, in float64."""
        dropped = total = 0.0
        for start, change in self._changes(after, before):
            wide = change.astype(np.float64)
            total += float(wide @ wide)
            # bounds of another dtype would have all positions converted, piece after piece
            first, last = np.searchsorted(positions, np.array((start, start + wide.size), positions.dtype))
            wide[positions[first:last] - start] = 0.0
            dropped += float(wide @ wide)
        return dropped, total

    def _changes(self, after: Float32s, before: Float32s | None) -> Iterator[tuple[int, Float32s]]:
        """Pieces of the change with their start; each is overwritten by the next."""
        for start in range(0, after.size, _PIECE):
            piece = after[start : start + _PIECE]
            if before is not None:
                piece = np.subtract(piece, before[start : start + _PIECE], out=self._change[: piece.size])
            yield start, piece

    def _bracket(self, after: Float32s, before: Float32s | None, k: int) -> tuple[int, int]:
        """Magnitudes, at least 1, with the k-th largest very probably in [first, second]; of more than a sample."""
        n = after.size
        size = max(_SAMPLE, n >> 7)
        places = _places(n, size)
        sample = after.take(places)
        if before is not None:
            sample -= before.take(places)
        bits = sample.view(np.int32)
        bits &= _MAGNITUDE
        # Four standard deviations of the rank in a random sample; one in 30,000 layers falls outside.
        spread = 4 * math.sqrt(size * (k / n) * (1 - k / n)) + 1
        low, high = math.ceil(k * size / n + spread), math.floor(k * size / n - spread)
        bits.partition([size - rank for rank in {low, high} if 0 < rank <= size] or [0])
        floor = max(1, int(bits[size - low])) if low <= size else 1
        return floor, max(floor, int(bits[size - high]) if high > 0 else _INFINITY)

    def _candidates(
        self, after: Float32s, before: Float32s | None, k: int, floor: int, reductions: int = _REDUCTIONS
    ) -> int | None:
        """Put entries of magnitude `floor` or more into the buffers, all but such as cannot be among the `k` largest.

        Returns:
            How many there are, or `None` if `floor` is so low that the buffer was full more than `reductions` times.
        """
        n = after.size
        self._reserve(min(n, k + k // 4 + _PIECE), n)
        room, count = self._values.size, 0
        for start in range(0, n, _PIECE):
            stop = min(start + _PIECE, n)
            if room - count < stop - start:
                if reductions == 0:
                    return None
                reductions -= 1
                chosen, threshold = _strongest(self._values[:count].view(np.int32) & _MAGNITUDE, k, _INFINITY)
                self._positions[:k], self._values[:k] = self._positions.take(chosen), self._values.take(chosen)
                # An entry that equals the weakest of k earlier ones comes too late.
                floor, count = threshold + 1, k
            count += self._gather(after[start:stop], before, start, floor, count)
        return count

    def _gather(self, piece: Float32s, before: Float32s | None, start: int, floor: int, count: int) -> int:
        size = piece.size
        if before is not None:
            piece = np.subtract(piece, before[start : start + size], out=self._change[:size])
        bits = np.bitwise_and(piece.view(np.int32), _MAGNITUDE, out=self._bits[:size])
        found = np.greater_equal(bits, floor, out=self._mask[:size]).nonzero()[0]
        stop = count + found.size
        np.add(found, start, out=self._positions[count:stop], casting="unsafe")
        piece.take(found, out=self._values[count:stop], mode="clip")  # "raise" would go through a copy
        return int(found.size)

    def _reserve(self, room: int, n: int) -> None:
        dtype = np.int32 if n < _INT32_ENTRIES else np.int64
        if self._values.size < room or self._positions.dtype != dtype:
            self._positions = np.empty(room, dtype)
            self._values = np.empty(room, np.float32)

    def _threshold(self, after: Float32s, before: Float32s | None, k: int) -> int:
        """The `k`-th largest magnitude, by counting the upper 15 bits and then the lower 16 of those that share them.

        Slower than a bracket, but its time does not depend on the values.
        """
        upper = np.zeros(1 << 15, np.int64)
        for _, change in self._changes(after, before):
            upper += np.bincount((change.view(np.int32) & _MAGNITUDE) >> 16, minlength=upper.size)
        digit, rank = _digit(upper, k)
        lower = np.zeros(1 << 16, np.int64)
        for _, change in self._changes(after, before):
            bits = change.view(np.int32) & _MAGNITUDE
            lower += np.bincount(bits[bits >> 16 == digit] & 0xFFFF, minlength=lower.size)
        return digit << 16 | _digit(lower, rank)[0]

    def _not_finite(self, after: Float32s, before: Float32s | None) -> str:
        for start, change in self._changes(after, before):
            bad = (~np.isfinite(change)).nonzero()[0]
            if bad.size:
                got = f"{float(change[bad[0]])} at position {start + int(bad[0])}"
                break
        remedy = "A change that is not finite comes from training that has diverged."
        return expected("values", "finite everywhere", got, remedy)


@functools.lru_cache(maxsize=256)
def _places(n: int, size: int) -> NDArray[np.int64]:
    """One position in each of `size` equal stretches; at no fixed distance, or they could all be of one column."""
    order = np.arange(size, dtype=np.int64)
    scattered = order * 2654435769 & 0xFFFFFFFF  # multiples of the golden ratio, modulo 1
    return order * n // size + (scattered * (n // size) >> 32)


def _digit(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The digit of the `rank`-th largest, and its rank among those with this digit."""
    at_least = counts[::-1].cumsum()[::-1]
    digit = int(np.flatnonzero(at_least >= rank)[-1])
    return digit, rank - int(at_least[digit] - counts[digit])


def _strongest(magnitudes: NDArray[np.int32], k: int, ceiling: int) -> tuple[NDArray[np.intp], int]:
    """Places of the `k` largest of more than `k` magnitudes, the first of equal ones; and the smallest of them.

    Only up to `ceiling` is it looked for, if that holds enough; the result does not depend on it.
    """
    low = (magnitudes <= ceiling).nonzero()[0]
    wanted = k - (magnitudes.size - low.size)
    threshold = _nth_largest(magnitudes.take(low), wanted) if wanted > 0 else _nth_largest(magnitudes, k)
    keep = magnitudes >= threshold
    excess = int(np.count_nonzero(keep)) - k
    if excess:
        keep[(magnitudes == threshold).nonzero()[0][-excess:]] = False
    return keep.nonzero()[0], threshold


def _nth_largest(numbers: NDArray[np.int32], rank: int) -> int:
    """By counting digits: a partition takes up to thirty times as long where many numbers are equal."""
    low = int(numbers.min())
    span = int(numbers.max()) - low
    while span:
        shift = max(0, span.bit_length() - _DIGIT_BITS)
        digits = (numbers - np.int32(low)) >> shift
        digit, rank = _digit(np.bincount(digits), rank)
        low += digit << shift
        span = (1 << shift) - 1
        numbers = numbers[digits == digit] if span else numbers
    return low
