"""Encoded changes of one layer, added to a float64 sum without being made tensors one by one.

What many small layers of many steps cost is not arithmetic but calls, and what large ones cost is fresh memory. So
changes are decoded in batches, into memory that each thread keeps.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_unlearn.functional.kernels import AddGaps, load_add_gaps
from lightning_unlearn.store.codec import EncodedLayer
from lightning_unlearn.store.position_codes import decode_gaps, decode_positions
from lightning_unlearn.store.value_codes import VALUE_WIDTHS, unscaled_values
from lightning_unlearn.types import IndexCodec

__all__ = ["Piece", "add_encoded"]

Piece: TypeAlias = tuple[EncodedLayer, float]
"""The change of a layer in one step, and what it is multiplied by."""

_BATCH = 2**17  # codes that numpy decodes together: what they need stays in the cache
_COMPILED_BATCH = 2**21  # codes that are added together by the compiled pass, which walks through the sum once


class _Scratch(threading.local):
    def __init__(self) -> None:
        self._places = np.empty(0, np.int64)
        self._values = np.empty(0, np.float64)
        self._narrow = np.empty(0, np.float32)

    def places(self, count: int) -> npt.NDArray[np.int64]:
        if self._places.size < count:
            self._places = np.empty(max(count, _BATCH), np.int64)
        return self._places[:count]

    def values(self, count: int) -> npt.NDArray[np.float64]:
        if self._values.size < count:
            self._values = np.empty(max(count, _BATCH), np.float64)
        return self._values[:count]

    def narrow(self, count: int) -> npt.NDArray[np.float32]:
        if self._narrow.size < count:
            self._narrow = np.empty(max(count, _BATCH), np.float32)
        return self._narrow[:count]


_scratch = _Scratch()


def _batches(pieces: Sequence[Piece], size_limit: int) -> Iterator[list[Piece]]:
    """Neighbours that can be decoded together: the order of additions is that of the pieces."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        layer = piece[0]
        if layer.kept == 0:
            if layer.index.size or layer.value.size:
                raise ValueError(f"{layer.index.size + layer.value.size} bytes for no entry")
            continue
        alike = not batch or (
            layer.index_codec is IndexCodec.GAP8
            and batch[0][0].index_codec is IndexCodec.GAP8
            and batch[0][0].value_dtype == layer.value_dtype
            and size + layer.index.size <= size_limit
        )
        if not alike:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += layer.index.size
    if batch:
        yield batch


def _unscaled(batch: Sequence[Piece], room: npt.NDArray[Any]) -> None:
    value_dtype = batch[0][0].value_dtype
    for layer, _ in batch:
        if layer.value.size != VALUE_WIDTHS[value_dtype] * layer.kept:
            raise ValueError(f"{layer.kept} values as {value_dtype} have {layer.value.size} bytes")
    raw = np.concatenate([layer.value for layer, _ in batch])
    torch.from_numpy(room).copy_(unscaled_values(value_dtype, raw))


def _factors(batch: Sequence[Piece]) -> npt.NDArray[np.float64]:
    """All values of a batch, multiplied; valid until this thread's next call."""
    values = _scratch.values(sum(layer.kept for layer, _ in batch))
    _unscaled(batch, values)
    place = 0
    for layer, amount in batch:
        values[place : place + layer.kept] *= layer.scale * amount
        place += layer.kept
    return values


def _positions(batch: Sequence[Piece], numel: int) -> npt.NDArray[np.int64] | None:
    first = batch[0][0]
    if first.index_codec is not IndexCodec.GAP8:
        return decode_positions(first.index_codec, first.index, first.kept, numel)
    codes = [layer.index for layer, _ in batch]
    if not all(map(len, codes)):
        raise ValueError("no positions for values")
    return decode_gaps(codes, [layer.kept for layer, _ in batch], numel, _scratch.places(sum(map(len, codes))))


def _add_compiled(total: Tensor, batch: Sequence[Piece], add: AddGaps) -> None:
    kept = np.cumsum([0, *(layer.kept for layer, _ in batch)])
    values = _scratch.narrow(int(kept[-1]))
    _unscaled(batch, values)
    codes = [layer.index for layer, _ in batch]
    factors = np.array([layer.scale * amount for layer, amount in batch])
    if not add(total.numpy(), np.concatenate(codes), np.cumsum([0, *map(len, codes)]), values, kept, factors):
        raise ValueError(f"positions and values do not fit a layer of {total.numel()} entries, or each other")


def add_encoded(total: Tensor, pieces: Sequence[Piece]) -> None:
    """Add `amount * change` to a sum, piece by piece in their order.

    Exact up to float64 rounding for what is written in the pieces (the value times its factor, not rounded to float32
    first), and deterministic. Safe in several threads for different sums.

    Args:
        total: float64 of shape (numel,), on the CPU and contiguous; changed in place.
        pieces: Changes of this layer.

    Raises:
        ValueError: the parts of a piece do not fit each other or the layer; pieces before it have been added.
    """
    numel, add = total.numel(), load_add_gaps()
    for batch in _batches(pieces, _BATCH if add is None else _COMPILED_BATCH):
        if add is not None and batch[0][0].index_codec is IndexCodec.GAP8:
            _add_compiled(total, batch, add)
            continue
        positions, values = _positions(batch, numel), torch.from_numpy(_factors(batch))
        if positions is None:
            total.add_(values)
        else:
            total.scatter_add_(0, torch.from_numpy(positions), values)
