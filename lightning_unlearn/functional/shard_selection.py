"""Exact selection of the largest magnitudes of layers that are in pieces on several processes.

Only counts travel: three histograms narrow the magnitude of the k-th entry down to one value, ten or eleven bits at a
time. Three small rounds, not two of 16 bits, which would move twenty times as many bytes; each is one reduction for
all layers together. Entries that equal the threshold are rarely too many, and only then is it asked who has how many.

A float32 without its sign bit is an int32 that orders like the magnitude (as in `selection`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Alone", "NotFiniteError", "Reductions", "select_shards"]

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_SHIFTS = (20, 10, 0)
_BINS = 1 << 11
_INT32_ENTRIES = 1 << 31


class NotFiniteError(ValueError):
    """An entry is infinite or NaN; raised by all processes.

    Attributes:
        row: In which row it is.
    """

    def __init__(self, row: int) -> None:
        super().__init__(f"Expected `rows` to be finite everywhere, but row {row} is not: the training has diverged.")
        self.row = row


class Reductions(Protocol):
    """What several processes do together; every process calls the same, with tensors of the same shape and dtype."""

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, entry by entry."""

    def before(self, values: Tensor) -> Tensor:
        """The sum over the processes that come before this one, entry by entry."""


class Alone:
    """The reductions of one process."""

    def total(self, values: Tensor) -> Tensor:
        """The values."""
        return values

    def before(self, values: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(values)


def _magnitudes(piece: Tensor) -> Tensor:
    return piece.view(torch.int32) & _MAGNITUDE


def _as_they_are(bits: Tensor) -> Tensor:
    return bits


def _histogram(candidates: Iterable[Tensor], shift: int, like: Tensor) -> Tensor:
    last = _BINS - 1 if shift == _SHIFTS[0] else _BINS // 2 - 1
    counts = torch.zeros_like(like)
    for one in candidates:
        counts += torch.bincount((one >> shift) & last, minlength=_BINS).to(like.device)
    return counts


def _digits(histograms: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the digit of the `ranks`-th largest, and its rank among those of this digit; 0 where fewer exist."""
    at_least = histograms.flip(1).cumsum(1).flip(1)
    digits = (at_least >= ranks[:, None]).sum(1).sub(1).clamp(min=0)
    rows = torch.arange(len(ranks), device=ranks.device)
    return digits, ranks - (at_least[rows, digits] - histograms[rows, digits])


@torch.no_grad()
def select_shards(
    rows: Sequence[Sequence[Tensor]],
    kept: Sequence[int],
    reductions: Reductions,
    *,
    numel: int = _INT32_ENTRIES - 1,
    device: torch.device | None = None,
) -> list[list[Tensor]]:
    """Where the `kept` largest magnitudes of each row are, of a row whose entries are spread over processes.

    Exact, and never a zero: a row in which fewer entries than that are not zero has fewer. Of equal magnitudes those of
    the first process win, then those of the first piece and position; where pieces are runs of a layer in the order of
    the processes, that is the choice one process would make. A process holds, beside its changes, the magnitudes of its
    largest piece.

    Args:
        rows: For each row (a layer, or all layers) this process's pieces of it: contiguous float32 of shape (n,).
        kept: How many entries of each whole row to keep, at least 1; the same on all processes.
        reductions: What the processes do together: four calls at most.
        numel: The largest number of entries of a row, over all processes; decides how wide counts are.
        device: Where counts are formed; by default where the first piece is.

    Returns:
        For each row and piece the positions in it, ascending, int64.

    Raises:
        NotFiniteError: an entry of some process is not finite; raised by all of them.

    >>> select_shards([[torch.tensor([1.0, -3.0, 0.0]), torch.tensor([3.0, 2.0])]], [2], Alone())
    [[tensor([1]), tensor([0])]]
    """
    found = device or next((piece.device for row in rows for piece in row), torch.device("cpu"))
    wide = torch.int64 if numel >= _INT32_ENTRIES else torch.int32
    empty = torch.zeros(_BINS, dtype=wide, device=found)
    ranks = torch.tensor(kept, dtype=torch.int64, device=found)
    thresholds = torch.zeros_like(ranks)
    held: Sequence[Sequence[Tensor]] = rows
    histograms = torch.empty(0)
    for shift in _SHIFTS:
        bits_of = _magnitudes if held is rows else _as_they_are
        local = [_histogram(map(bits_of, row), shift, empty) for row in held]
        histograms = reductions.total(torch.stack(local)).to(torch.int64)
        broken = histograms[:, _INFINITY >> shift :].sum(1).nonzero() if held is rows else empty[:0]
        if broken.numel():
            raise NotFiniteError(int(broken[0]))
        digits, ranks = _digits(histograms, ranks)
        thresholds += digits << shift
        # Of the next digits only entries matter that share those so far, which are few.
        held = [
            [bits[bits >> shift == limit >> shift] for bits in map(bits_of, row)]
            for row, limit in zip(held, thresholds.tolist(), strict=True)
        ]
    equal = histograms.gather(1, (thresholds & (_BINS // 2 - 1))[:, None]).squeeze(1)
    own = torch.tensor([sum(map(len, row)) for row in held], dtype=torch.int64, device=found)
    # Where the threshold is zero there are not enough entries, and all that are not zero are kept.
    spare = torch.where(thresholds > 0, own, torch.iinfo(torch.int64).max)
    crowded = (equal > ranks) & (thresholds > 0)
    if bool(crowded.any()):
        spare = torch.where(crowded, (ranks - reductions.before(own)).clamp(min=0).minimum(own), spare)
    return [
        _positions(row, max(limit, 1), share)
        for row, limit, share in zip(rows, thresholds.tolist(), spare.tolist(), strict=True)
    ]


def _positions(row: Sequence[Tensor], threshold: int, share: int) -> list[Tensor]:
    """Positions above the threshold, and of the first `share` entries that equal it."""
    chosen = []
    for piece in row:
        bits = _magnitudes(piece)
        positions = (bits >= threshold).nonzero().squeeze(1)
        ties = bits[positions] == threshold
        excess = int(ties.sum()) - share
        if excess > 0:
            keep = torch.ones_like(ties)
            keep[ties.nonzero().squeeze(1)[share:]] = False
            positions = positions[keep]
            share = 0
        else:
            share = -excess
        chosen.append(positions)
    return chosen
