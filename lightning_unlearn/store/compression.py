"""The payload of one step: the bytes of all its layers, plain or compressed with zstd.

Before compression two reversible filters bring out what zstd can find: the low bytes of `BLOCK8` positions become
differences modulo 256, and values are written byte plane by byte plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.store.codec import Bytes, EncodedLayer
from lightning_unlearn.types import IndexCodec
from lightning_unlearn.utilities.checks import expected

__all__ = ["Compression", "check_compression", "join_payload", "split_payload"]

Compression: TypeAlias = Literal["zstd"] | None

_LEVEL = 1  # higher levels cost several times the seconds for a few percent of the bytes


def _zstandard() -> Any:
    try:
        import zstandard  # an optional extra
    except ImportError as error:
        raise MissingRequirementError(
            expected(
                "compression",
                "None where the package `zstandard` is not installed",
                "zstd",
                "Install it with `pip install lightning-unlearn[zstd]`.",
            )
        ) from error
    return zstandard


def check_compression(compression: str | None) -> None:
    """Check that payloads can be written and read.

    Raises:
        ValueError: not a known compression.
        MissingRequirementError: `"zstd"` without the package `zstandard`.
    """
    if compression not in (None, "zstd"):
        raise ValueError(expected("compression", "one of None, 'zstd'", compression))
    if compression == "zstd":
        _zstandard()


def _width(layer: EncodedLayer) -> int:
    return 4 if layer.value_dtype == "float32" else 2


def _filtered(layer: EncodedLayer) -> list[Bytes]:
    index = layer.index
    if layer.index_codec is IndexCodec.BLOCK8 and layer.kept:
        low = index[: layer.kept]
        index = np.concatenate([low[:1], low[1:] - low[:-1], index[layer.kept :]])
    return [index, np.ascontiguousarray(layer.value.reshape(-1, _width(layer)).T).reshape(-1)]


def _unfiltered(layer: EncodedLayer) -> EncodedLayer:
    index = layer.index
    if layer.index_codec is IndexCodec.BLOCK8 and layer.kept:
        low = np.cumsum(index[: layer.kept], dtype=np.uint8)
        index = np.concatenate([low, index[layer.kept :]])
    value = np.ascontiguousarray(layer.value.reshape(_width(layer), -1).T).reshape(-1)
    return EncodedLayer(layer.layer, layer.kept, layer.index_codec, layer.value_dtype, layer.scale, index, value)


def join_payload(layers: Sequence[EncodedLayer], compression: Compression) -> bytes:
    """The bytes of all layers of a step, each its positions and then its values."""
    if compression is None:
        return b"".join(part.tobytes() for layer in layers for part in (layer.index, layer.value))
    raw = b"".join(part.tobytes() for layer in layers for part in _filtered(layer))
    return bytes(_zstandard().ZstdCompressor(level=_LEVEL).compress(raw)) if raw else b""


def split_payload(
    payload: bytes, layers: Sequence[tuple[EncodedLayer, int, int]], compression: Compression
) -> list[EncodedLayer]:
    """Give each layer its bytes back.

    Args:
        payload: What `join_payload` returned.
        layers: The layers without their bytes, and how many bytes of positions and of values each has.
        compression: As it was joined.

    Raises:
        ValueError: the payload does not hold that many bytes, or cannot be decompressed.
    """
    total = sum(index_bytes + value_bytes for _, index_bytes, value_bytes in layers)
    if compression is not None and payload:
        zstandard = _zstandard()
        try:
            payload = zstandard.ZstdDecompressor().decompress(payload, max_output_size=total)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
    if len(payload) != total:
        raise ValueError(f"{len(payload)} bytes where the layers need {total}")
    data, position, result = np.frombuffer(payload, np.uint8), 0, []
    for layer, index_bytes, value_bytes in layers:
        index, value = np.split(data[position : position + index_bytes + value_bytes], [index_bytes])
        position += index_bytes + value_bytes
        filled = EncodedLayer(layer.layer, layer.kept, layer.index_codec, layer.value_dtype, layer.scale, index, value)
        result.append(filled if compression is None else _unfiltered(filled))
    return result
