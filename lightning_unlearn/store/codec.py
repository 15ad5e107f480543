"""How the change of one layer becomes bytes, and back.

Positions are exact. Values are exact as `float32`; `bfloat16` keeps 8 significant bits (relative error at most
2**-8); `scaled_float16` keeps 11 (relative error at most 2**-10.99, or 2**-24 of the layer's largest change where
that is more), because a power of two per layer brings the largest change into (1/2, 1]: unscaled, small changes would
be flushed to zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from lightning_unlearn.types import IndexCodec, LayerDelta, ValueDtype
from lightning_unlearn.utilities.checks import expected

__all__ = ["VALUE_CODES", "Bytes", "EncodedLayer", "decode_layer", "encode_layer"]

Bytes: TypeAlias = npt.NDArray[np.uint8]

VALUE_CODES: tuple[ValueDtype, ...] = ("float32", "bfloat16", "scaled_float16")
"""Value dtypes in the order of the numbers that stand for them on disk."""

_BLOCK = 256
_FLOAT16_BELOW_TWO = 2.0 - 2.0**-10
_BFLOAT16_MAX = float(torch.finfo(torch.bfloat16).max)


@dataclass(frozen=True, slots=True)
class EncodedLayer:
    """One layer's change as bytes.

    Attributes:
        layer: The layer's number in the model signature.
        kept: Number of kept entries.
        index_codec: How `index` is to be read; no bytes where nothing or everything is kept.
        value_dtype: How `value` is to be read.
        scale: What the decoded values are multiplied by (1.0 unless scaled).
        index: uint8 of shape (bytes,).
        value: uint8 of shape (bytes,).
    """

    layer: int
    kept: int
    index_codec: IndexCodec
    value_dtype: ValueDtype
    scale: float
    index: Bytes
    value: Bytes


def _encode_indices(indices: npt.NDArray[np.int64], numel: int) -> tuple[IndexCodec, Bytes]:
    if indices.size == numel:
        return IndexCodec.DENSE, np.empty(0, np.uint8)
    codec = IndexCodec.BITMASK if 8 * indices.size >= numel else IndexCodec.BLOCK8
    if indices.size == 0:
        return codec, np.empty(0, np.uint8)
    if codec is IndexCodec.BITMASK:
        mask = np.zeros(numel, np.bool_)
        mask[indices] = True
        return codec, np.packbits(mask)
    starts = np.searchsorted(indices, np.arange(0, numel + _BLOCK, _BLOCK))
    counts = np.diff(starts).astype("<u2")
    return codec, np.concatenate([indices.astype(np.uint8), counts.view(np.uint8)])


def _decode_indices(encoded: EncodedLayer, numel: int) -> npt.NDArray[np.int64] | None:
    if encoded.index_codec is IndexCodec.DENSE:
        if encoded.kept != numel or encoded.index.size:
            raise ValueError(f"a dense layer of {numel} entries holds {encoded.kept}")
        return None
    if encoded.kept == 0:
        return np.empty(0, np.int64)
    if encoded.index_codec is IndexCodec.BITMASK:
        if encoded.index.size != -(-numel // 8):
            raise ValueError(f"a mask over {numel} entries has {encoded.index.size} bytes")
        indices = np.flatnonzero(np.unpackbits(encoded.index, count=numel))
    else:
        blocks = -(-numel // _BLOCK)
        if encoded.index.size != encoded.kept + 2 * blocks:
            raise ValueError(f"positions of {encoded.kept} of {numel} entries have {encoded.index.size} bytes")
        counts = np.frombuffer(encoded.index[encoded.kept :].tobytes(), "<u2")
        indices = np.repeat(np.arange(0, blocks * _BLOCK, _BLOCK), counts)
        if indices.size == encoded.kept:
            indices += encoded.index[: encoded.kept]
    if indices.size != encoded.kept:
        raise ValueError(f"{indices.size} positions for {encoded.kept} values")
    return indices.astype(np.int64, copy=False)


def _encode_values(values: npt.NDArray[np.float32], value_dtype: ValueDtype) -> tuple[float, Bytes]:
    largest = float(np.abs(values).max(initial=0.0))
    if not math.isfinite(largest):
        raise ValueError(expected("values", "finite", largest, "Find out why the weights are not finite."))
    if value_dtype == "float32":
        return 1.0, np.ascontiguousarray(values, "<f4").view(np.uint8)
    if value_dtype == "bfloat16":
        tensor = torch.from_numpy(np.clip(values, -_BFLOAT16_MAX, _BFLOAT16_MAX))
        return 1.0, tensor.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2", copy=False).view(np.uint8)
    if largest == 0.0:
        return 1.0, np.zeros(2 * values.size, np.uint8)
    mantissa, exponent = math.frexp(largest)
    exponent = min(exponent - (mantissa == 0.5), 127)  # 2.0**exponent is the next power of two from `largest` on
    scaled = np.clip(np.ldexp(values, -exponent), -_FLOAT16_BELOW_TWO, _FLOAT16_BELOW_TWO)
    return math.ldexp(1.0, exponent), scaled.astype("<f2").view(np.uint8)


def _decode_values(encoded: EncodedLayer) -> npt.NDArray[np.float32]:
    width = 4 if encoded.value_dtype == "float32" else 2
    if encoded.value.size != width * encoded.kept:
        raise ValueError(f"{encoded.kept} values of {width} bytes have {encoded.value.size} bytes")
    data = encoded.value.tobytes()  # a copy: the bytes may lie unaligned in a payload
    if encoded.value_dtype == "float32":
        return np.frombuffer(data, "<f4").astype(np.float32)
    if encoded.value_dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(data, "<f2").astype(np.float32) * np.float32(encoded.scale)


def encode_layer(delta: LayerDelta, numel: int, value_dtype: ValueDtype) -> EncodedLayer:
    """Encode one layer's change.

    Args:
        delta: Kept positions (ascending, distinct) and values.
        numel: Number of entries of the layer.
        value_dtype: How values are written.

    Raises:
        ValueError: positions and values do not fit each other or the layer, or a value is not finite.
    """
    values = np.ascontiguousarray(delta.values.detach().cpu().to(torch.float32).reshape(-1).numpy())
    if delta.indices is None:
        indices = None
        fits = values.size == numel
    else:
        indices = delta.indices.detach().cpu().to(torch.int64).numpy()
        fits = indices.size == values.size and (
            indices.size == 0
            or (int(indices[0]) >= 0 and int(indices[-1]) < numel and bool((indices[1:] > indices[:-1]).all()))
        )
    if not fits:
        raise ValueError(expected("delta", f"ascending positions below {numel}, one for each value", delta))
    codec, index = (IndexCodec.DENSE, np.empty(0, np.uint8)) if indices is None else _encode_indices(indices, numel)
    scale, value = _encode_values(values, value_dtype)
    return EncodedLayer(delta.layer, values.size, codec, value_dtype, scale, index, value)


def decode_layer(encoded: EncodedLayer, numel: int) -> LayerDelta:
    """Decode one layer's change.

    >>> delta = LayerDelta(0, torch.tensor([3, 700]), torch.tensor([0.5, -0.25]))
    >>> decode_layer(encode_layer(delta, 1000, "scaled_float16"), 1000)
    LayerDelta(layer=0, indices=tensor([  3, 700]), values=tensor([ 0.5000, -0.2500]))

    Raises:
        ValueError: the parts do not fit each other.
    """
    indices = _decode_indices(encoded, numel)
    if indices is not None and indices.size and int(indices[-1]) >= numel:
        raise ValueError(f"position {int(indices[-1])} in a layer of {numel} entries")
    values = torch.from_numpy(_decode_values(encoded))
    return LayerDelta(encoded.layer, None if indices is None else torch.from_numpy(indices), values)
