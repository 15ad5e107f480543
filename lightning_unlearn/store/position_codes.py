"""How the positions of a layer's kept entries become bytes, and back: exact, whatever the code.

`GAP8` is one byte for each kept entry: how many entries were left out before it, 0 to 254; 255 goes on by 255 entries
without keeping one, and is never the last byte. `BITMASK` is one bit for each entry of the layer. `BLOCK16` is the low
16 bits of every position and the number of kept entries in each block of 65,536. `BLOCK8`, the same with 8 bits and
blocks of 256, is read but no longer written: `GAP8` is never longer and as fast.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_unlearn.types import IndexCodec

__all__ = ["Bytes", "Positions", "chosen_code", "decode_gaps", "decode_positions", "encode_positions"]

Bytes: TypeAlias = npt.NDArray[np.uint8]
Positions: TypeAlias = npt.NDArray[np.int64] | npt.NDArray[np.int32]

_ESCAPE = 255
_FEW = 1000  # escapes that are cut out one by one, which is far faster than through a mask
_TOLERANCE = 1.03  # a code that is decoded faster may be this much longer than the shortest


def _gaps(positions: Positions, numel: int) -> Positions:
    """Entries left out before each kept one; narrow where possible, because this is memory traffic."""
    gaps = np.empty(positions.size, np.int64) if numel >= 2**31 else np.empty(positions.size, np.int32)
    gaps[0] = positions[0]
    np.subtract(positions[1:], positions[:-1], out=gaps[1:], casting="unsafe")
    gaps[1:] -= 1
    return gaps


def _block16(positions: Positions, numel: int) -> Bytes:
    starts = np.searchsorted(positions, np.arange(0, numel + 2**16, 2**16))
    counts = np.diff(starts).astype("<u4")
    return np.concatenate([positions.astype("<u2").view(np.uint8), counts.view(np.uint8)])


def _bitmask(positions: Positions, numel: int) -> Bytes:
    mask = np.zeros(numel, np.bool_)
    mask[positions] = True
    return np.packbits(mask)


def encode_positions(positions: Positions, numel: int) -> tuple[IndexCodec, Bytes]:
    """The shortest code of ascending, distinct positions; of codes of nearly the same length the fastest to decode.

    >>> encode_positions(np.array([0, 1, 300]), 4000)
    (<IndexCodec.GAP8: 3>, array([  0,   0, 255,  43], dtype=uint8))
    """
    kept = positions.size
    if kept == numel:
        return IndexCodec.DENSE, np.empty(0, np.uint8)
    if kept == 0:
        return IndexCodec.GAP8, np.empty(0, np.uint8)
    if _mask_is_shorter(kept, numel):  # said before the gaps, which then need not be formed
        return IndexCodec.BITMASK, _bitmask(positions, numel)
    gaps = _gaps(positions, numel)
    wide = np.flatnonzero(gaps >= _ESCAPE)
    if not wide.size:
        return IndexCodec.GAP8, gaps.astype(np.uint8)
    escapes = gaps[wide] // _ESCAPE
    codec, _ = chosen_code(kept, numel, int(escapes.sum()))
    if codec is IndexCodec.BLOCK16:
        return codec, _block16(positions, numel)
    if codec is IndexCodec.BITMASK:
        return codec, _bitmask(positions, numel)
    gaps[wide] -= escapes * _ESCAPE
    return codec, np.insert(gaps.astype(np.uint8), np.repeat(wide, escapes), _ESCAPE)


def _mask_is_shorter(kept: int, numel: int) -> bool:
    return -(-numel // 8) * _TOLERANCE < kept


def chosen_code(kept: int, numel: int, escapes: float) -> tuple[IndexCodec, float]:
    """Which code `encode_positions` takes, and the bytes of it.

    Args:
        kept: Number of positions.
        numel: Number of entries of the layer.
        escapes: How many bytes of 255 `GAP8` needs: each stands for 255 entries that were left out. May be an
            expectation, of positions that are not known yet.

    >>> chosen_code(100, 1000, 0), chosen_code(300, 1000, 0), chosen_code(100, 100_000, 300)
    ((<IndexCodec.GAP8: 3>, 100), (<IndexCodec.BITMASK: 1>, 125), (<IndexCodec.BLOCK16: 4>, 208))
    """
    if kept == numel:
        return IndexCodec.DENSE, 0
    if kept == 0:
        return IndexCodec.GAP8, 0
    mask_bytes, block_bytes, gap_bytes = -(-numel // 8), 2 * kept + 4 * -(-numel // 2**16), kept + escapes
    shortest = min(mask_bytes, block_bytes, gap_bytes)
    if _mask_is_shorter(kept, numel):
        return IndexCodec.BITMASK, mask_bytes
    if block_bytes <= shortest * _TOLERANCE:
        return IndexCodec.BLOCK16, block_bytes
    if gap_bytes > shortest * _TOLERANCE:
        return IndexCodec.BITMASK, mask_bytes
    return IndexCodec.GAP8, gap_bytes


def _from_mask(data: Bytes, kept: int, numel: int) -> npt.NDArray[np.int64]:
    if data.size != -(-numel // 8):
        raise ValueError(f"a mask over {numel} entries has {data.size} bytes")
    return np.flatnonzero(np.unpackbits(data, count=numel).view(np.bool_))  # bytes would be searched 5 times slower


def _without_escapes(places: npt.NDArray[np.int64], escapes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if escapes.size > _FEW:
        return np.delete(places, escapes)
    for count, (escape, end) in enumerate(itertools.pairwise([*escapes.tolist(), places.size]), 1):
        places[escape - count + 1 : end - count] = places[escape + 1 : end]
    return places[: places.size - escapes.size]


def decode_gaps(
    parts: Sequence[Bytes], kept: Sequence[int], numel: int, scratch: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int64]:
    """The positions behind several `GAP8` codes of the same layer, one after the other, in one pass.

    Args:
        parts: The codes, none of them empty.
        kept: Number of kept entries of each.
        numel: Number of entries of the layer.
        scratch: int64 with room for all codes, which then holds the result; memory of its own otherwise.

    Returns:
        int64 of shape (sum(kept),), ascending within each code.

    Raises:
        ValueError: the arguments do not fit each other.

    >>> decode_gaps([np.array([2, 255, 0], np.uint8), np.array([7], np.uint8)], [2, 1], 1000)
    array([  2, 258,   7])
    """
    codes = np.concatenate(parts)
    places: npt.NDArray[np.int64] = np.empty(codes.size, np.int64) if scratch is None else scratch[: codes.size]
    starts = np.cumsum([0, *map(len, parts)])
    escapes = np.flatnonzero(codes == _ESCAPE) if codes.size != sum(kept) else np.empty(0, np.int64)
    found = np.diff(starts) - np.diff(np.searchsorted(escapes, starts))
    if found.tolist() != list(kept):
        raise ValueError(f"{found.tolist()} positions for {list(kept)} values")
    np.copyto(places, codes)
    places += 1
    places[escapes] -= 1
    places[0] -= 1
    longest = 0
    if len(parts) > 1:
        lengths = np.add.reduceat(places, starts[:-1])
        lengths[0] += 1
        longest = int(lengths.max())
        places[starts[1:-1]] -= lengths[:-1]  # every code begins before the first entry again
    np.cumsum(places, out=places)
    last = max(int(places[-1]), longest - 1)
    if last >= numel:
        raise ValueError(f"position {last} in a layer of {numel} entries")
    return _without_escapes(places, escapes) if escapes.size else places


def _from_gaps(data: Bytes, kept: int, numel: int) -> npt.NDArray[np.int64]:
    if not data.size:
        raise ValueError(f"0 positions for {kept} values")
    return decode_gaps([data], [kept], numel)


def _from_blocks(data: Bytes, kept: int, numel: int, bits: int, count_type: str) -> npt.NDArray[np.int64]:
    blocks, low_bytes = -(-numel // 2**bits), kept * bits // 8
    if data.size != low_bytes + blocks * np.dtype(count_type).itemsize:
        raise ValueError(f"positions of {kept} of {numel} entries have {data.size} bytes")
    counts = np.frombuffer(data[low_bytes:].tobytes(), count_type)
    if int(counts.sum(dtype=np.int64)) != kept:  # looked at first: damaged counts would make an array of any size
        raise ValueError(f"{int(counts.sum(dtype=np.int64))} positions for {kept} values")
    positions: npt.NDArray[np.int64] = np.repeat(np.arange(0, blocks << bits, 1 << bits), counts)
    positions += np.frombuffer(data[:low_bytes].tobytes(), f"<u{bits // 8}")
    return positions


_DECODERS: dict[IndexCodec, Callable[[Bytes, int, int], npt.NDArray[np.int64]]] = {
    IndexCodec.BITMASK: _from_mask,
    IndexCodec.BLOCK8: lambda data, kept, numel: _from_blocks(data, kept, numel, 8, "<u2"),
    IndexCodec.GAP8: _from_gaps,
    IndexCodec.BLOCK16: lambda data, kept, numel: _from_blocks(data, kept, numel, 16, "<u4"),
}


def decode_positions(codec: IndexCodec, data: Bytes, kept: int, numel: int) -> npt.NDArray[np.int64] | None:
    """The positions behind a code, or `None` where every entry is kept.

    Args:
        codec: How `data` is to be read.
        data: uint8 of shape (bytes,).
        kept: Number of kept entries.
        numel: Number of entries of the layer.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    if codec is IndexCodec.DENSE:
        if kept != numel or data.size:
            raise ValueError(f"a dense layer of {numel} entries holds {kept}")
        return None
    if kept == 0:
        return np.empty(0, np.int64)
    positions = _DECODERS[codec](data, kept, numel)
    if positions.size != kept:
        raise ValueError(f"{positions.size} positions for {kept} values")
    if int(positions[-1]) >= numel:
        raise ValueError(f"position {int(positions[-1])} in a layer of {numel} entries")
    return positions
