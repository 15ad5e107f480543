"""How the change of one layer becomes bytes, and back: positions exactly, values as `value_codes` says."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.store.position_codes import Bytes, decode_positions, encode_positions
from lightning_unlearn.store.value_codes import VALUE_CODES, VALUE_WIDTHS, decode_values, encode_values
from lightning_unlearn.types import IndexCodec, LayerDelta, ValueDtype
from lightning_unlearn.utilities.checks import expected

__all__ = [
    "VALUE_CODES",
    "VALUE_WIDTHS",
    "Bytes",
    "EncodedLayer",
    "decode_layer",
    "encode_layer",
    "relative_rounding_error",
]


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


def _plain_values(delta: LayerDelta) -> Tensor:
    return delta.values.detach().cpu().to(torch.float32).reshape(-1).contiguous()


def encode_layer(delta: LayerDelta, numel: int, value_dtype: ValueDtype) -> EncodedLayer:
    """Encode one layer's change.

    Args:
        delta: Kept positions (ascending, distinct; int32 or int64) and values.
        numel: Number of entries of the layer.
        value_dtype: How values are written.

    Raises:
        ValueError: positions and values do not fit each other or the layer, or a value is not finite.
    """
    values = _plain_values(delta)
    if delta.indices is None:
        indices = None
        fits = values.numel() == numel
    else:
        narrow = delta.indices.detach().cpu()
        indices = (narrow if narrow.dtype == torch.int32 else narrow.to(torch.int64)).contiguous().numpy()
        fits = indices.size == values.numel() and (
            indices.size == 0
            or (int(indices[0]) >= 0 and int(indices[-1]) < numel and bool((indices[1:] > indices[:-1]).all()))
        )
    if not fits:
        raise ValueError(expected("delta", f"ascending positions below {numel}, one for each value", delta))
    codec, index = (IndexCodec.DENSE, np.empty(0, np.uint8)) if indices is None else encode_positions(indices, numel)
    scale, value = encode_values(values, value_dtype)
    return EncodedLayer(delta.layer, values.numel(), codec, value_dtype, scale, index, value)


def decode_layer(encoded: EncodedLayer, numel: int) -> LayerDelta:
    """Decode one layer's change.

    >>> delta = LayerDelta(0, torch.tensor([3, 700]), torch.tensor([0.5, -0.25]))
    >>> decode_layer(encode_layer(delta, 1000, "scaled_float16"), 1000)
    LayerDelta(layer=0, indices=tensor([  3, 700]), values=tensor([ 0.5000, -0.2500]))

    Raises:
        ValueError: the parts do not fit each other.
    """
    positions = decode_positions(encoded.index_codec, encoded.index, encoded.kept, numel)
    values = decode_values(encoded.value_dtype, encoded.scale, encoded.value, encoded.kept)
    indices = None if positions is None else torch.from_numpy(positions)
    return LayerDelta(encoded.layer, indices, torch.from_numpy(values))


def relative_rounding_error(pairs: Iterable[tuple[LayerDelta, EncodedLayer]]) -> float:
    """L2 norm of what rounding changed in the kept values of a step, relative to them; sums are float64.

    0.0 where values are written as `float32`, and where all are zero.

    >>> delta = LayerDelta(0, None, torch.tensor([127.0, 0.5, -3.0]))
    >>> relative_rounding_error([(delta, encode_layer(delta, 3, "int8"))]) == 0.5 / (127.0**2 + 0.5**2 + 3**2) ** 0.5
    True
    """
    errors, norms = [], []
    for delta, encoded in pairs:
        exact = _plain_values(delta).double()  # torch throughout: numpy's own threads would fight with torch's
        rounded = decode_values(encoded.value_dtype, encoded.scale, encoded.value, encoded.kept)
        norms.append(float(torch.dot(exact, exact)))
        exact -= torch.from_numpy(rounded)
        errors.append(float(torch.dot(exact, exact)))
    norm = math.fsum(norms)
    return math.sqrt(math.fsum(errors) / norm) if norm else 0.0
