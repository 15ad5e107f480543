"""The payload of one step: the bytes of all its layers, plain or compressed with zstd.

Before compression two reversible filters bring out what zstd can find: the low words of `BLOCK16` positions become
differences modulo 65,536 (the low bytes of `BLOCK8` modulo 256), and whatever has several bytes is written byte plane
by byte plane. `GAP8` positions are differences already, and come to within a percent of the entropy of the mask.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.store.codec import VALUE_WIDTHS, Bytes, EncodedLayer
from lightning_unlearn.types import IndexCodec
from lightning_unlearn.utilities.checks import expected

__all__ = ["Compression", "check_compression", "join_payload", "split_payload"]

Compression: TypeAlias = Literal["zstd"] | None

_LEVEL = 1  # higher levels cost several times the seconds and save nothing: these bytes hold no repeats, only entropy
_OWN_BLOCK = 1024  # bytes of a plane from which its own code table costs less than it saves
_local = threading.local()  # contexts are costly to make and must not be shared by threads


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


def _compressor() -> Any:
    if not hasattr(_local, "compressor"):
        _local.compressor = _zstandard().ZstdCompressor(level=_LEVEL)
    return _local.compressor


def _decompressor() -> Any:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = _zstandard().ZstdDecompressor()
    return _local.decompressor


def _planes(data: Bytes, width: int) -> list[Bytes]:
    return [data] if width == 1 else list(np.ascontiguousarray(data.reshape(-1, width).T))


def _whole(planes: Bytes, width: int) -> Bytes:
    return planes if width == 1 else np.ascontiguousarray(planes.reshape(width, -1).T).reshape(-1)


_LOW_BYTES = {IndexCodec.BLOCK8: 1, IndexCodec.BLOCK16: 2}  # what a position's low bits take; the counts come behind


def _filtered(layer: EncodedLayer) -> list[Bytes]:
    parts, width = [layer.index], _LOW_BYTES.get(layer.index_codec)
    if width is not None and layer.kept:
        low, counts = np.split(layer.index, [width * layer.kept])
        words = low.view(f"<u{width}")
        differences = np.concatenate([words[:1], words[1:] - words[:-1]])
        parts = [*_planes(differences.view(np.uint8), width), counts]
    return [*parts, *_planes(layer.value, VALUE_WIDTHS[layer.value_dtype])]


def _unfiltered(layer: EncodedLayer) -> EncodedLayer:
    index, width = layer.index, _LOW_BYTES.get(layer.index_codec)
    if width is not None and layer.kept:
        planes, counts = np.split(index, [width * layer.kept])
        words = np.cumsum(_whole(planes, width).view(f"<u{width}"), dtype=f"<u{width}")
        index = np.concatenate([words.view(np.uint8), counts])
    return replace(layer, index=index, value=_whole(layer.value, VALUE_WIDTHS[layer.value_dtype]))


def _compress(parts: Sequence[Bytes]) -> bytes:
    total = sum(part.size for part in parts)
    if not total:
        return b""
    block, stream = _zstandard().COMPRESSOBJ_FLUSH_BLOCK, _compressor().compressobj(size=total)
    frame, open_block = [], False
    for part in parts:
        large = part.size >= _OWN_BLOCK
        if large and open_block:
            frame.append(stream.flush(block))
        frame.append(stream.compress(part.data))
        if large:
            frame.append(stream.flush(block))
        open_block = not large
    return b"".join([*frame, stream.flush()])


def join_payload(layers: Sequence[EncodedLayer], compression: Compression) -> bytes:
    """The bytes of all layers of a step, each its positions and then its values."""
    if compression is None:
        return b"".join([part.data for layer in layers for part in (layer.index, layer.value)])
    return _compress([part for layer in layers for part in _filtered(layer)])


def _decompress(payload: bytes | memoryview, total: int) -> bytes:
    """At most `total` bytes: what a damaged frame says of its size is looked at before anything is reserved."""
    zstandard = _zstandard()
    try:
        if zstandard.frame_content_size(payload) != total:
            raise ValueError(f"a frame of {zstandard.frame_content_size(payload)} bytes where the layers need {total}")
        return bytes(_decompressor().decompress(payload, max_output_size=total, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def split_payload(
    payload: bytes | memoryview,
    layers: Sequence[tuple[EncodedLayer, int, int]],
    compression: Compression,
    numbers: Collection[int] | None = None,
) -> list[EncodedLayer]:
    """Give each layer its bytes back.

    Args:
        payload: What `join_payload` returned.
        layers: The layers without their bytes, and how many bytes of positions and of values each has.
        compression: As it was joined.
        numbers: Only the layers with these numbers are given back.

    Raises:
        ValueError: the payload does not hold that many bytes, or cannot be decompressed.
    """
    total = sum(index_bytes + value_bytes for _, index_bytes, value_bytes in layers)
    if compression is not None and len(payload):
        payload = _decompress(payload, total)
    if len(payload) != total:
        raise ValueError(f"{len(payload)} bytes where the layers need {total}")
    data, position, result = np.frombuffer(payload, np.uint8), 0, []
    for layer, index_bytes, value_bytes in layers:
        middle, stop = position + index_bytes, position + index_bytes + value_bytes
        position = stop
        if numbers is not None and layer.layer not in numbers:
            continue
        index, value = data[middle - index_bytes : middle], data[middle:stop]
        filled = EncodedLayer(layer.layer, layer.kept, layer.index_codec, layer.value_dtype, layer.scale, index, value)
        result.append(filled if compression is None else _unfiltered(filled))
    return result
