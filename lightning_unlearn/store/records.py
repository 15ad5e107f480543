"""One recorded step as bytes, and its checksum."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_unlearn.store.codec import VALUE_CODES, EncodedLayer, decode_layer
from lightning_unlearn.store.compression import Compression, join_payload, split_payload
from lightning_unlearn.store.key_table import fits_int64, id_text
from lightning_unlearn.types import IndexCodec, LayerDelta, ModelSignature, SampleId, StepStatus
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.file_views import Raw

__all__ = [
    "ENTRY",
    "UNKNOWN_OPTIMIZER",
    "EncodedStep",
    "check_ids",
    "decode_step",
    "encode_step",
    "encoded_layers",
    "ids_bytes",
    "record_crc",
    "record_numbers",
]

ENTRY = np.dtype(
    [
        ("layer", "<i4"),
        ("kept", "<i8"),
        ("index_codec", "u1"),
        ("value_dtype", "u1"),
        ("scale", "<f8"),
        ("index_bytes", "<i8"),
        ("value_bytes", "<i8"),
    ]
)
"""One layer of one step; packed, as its bytes go into the record's checksum."""

UNKNOWN_OPTIMIZER = -1
"""Number of the optimizer in a record that was damaged wholly; its ids are unknown as well."""

_NUMBERS = struct.Struct("<qqqdqqffq")


@dataclass(frozen=True, slots=True)
class EncodedStep:
    """What one rank recorded of one step.

    Attributes:
        optimizer: Number of the optimizer that stepped.
        sample_ids: Ids behind the step on this rank, with repeats.
        batch_size: Number of samples behind the step on this rank.
        seconds: Wall time since the previous step.
        status: What happened to the delta.
        entries: Structured array of `ENTRY`, one for each layer.
        payload: Bytes of all layers, compressed where the segment says so.
        pruning_error: Relative L2 error that pruning made in this rank's layers; NaN where it was not measured.
        rounding_error: Relative L2 error that rounding made in the kept values; NaN where it was not measured.
        edited: Whether something other than an optimizer changed the weights since the step before.
    """

    optimizer: int
    sample_ids: tuple[SampleId, ...]
    batch_size: int
    seconds: float
    status: StepStatus
    entries: npt.NDArray[Any]
    payload: Raw
    pruning_error: float = math.nan
    rounding_error: float = math.nan
    edited: bool = False


def check_ids(sample_ids: Iterable[object]) -> tuple[SampleId, ...]:
    """Sample ids as plain `int` and `str`.

    >>> check_ids([np.int64(3), "user-7"])
    (3, 'user-7')

    Raises:
        ValueError: an id is neither an integer nor a string, or a single string was given, which is no collection.
    """
    if isinstance(sample_ids, str | bytes):
        raise ValueError(expected("sample_ids", "a collection of ids", sample_ids, "Put it in a list."))
    checked: list[SampleId] = []
    for sample_id in sample_ids:
        if type(sample_id) is int:  # nearly always, and asking for an abstract class takes ten times as long
            checked.append(sample_id)
        elif isinstance(sample_id, str):
            checked.append(str(sample_id))
        elif not isinstance(sample_id, bool) and isinstance(sample_id, Integral):
            checked.append(int(sample_id))
        else:
            raise ValueError(expected("sample_ids", "integers or strings", sample_id, "Convert it before recording."))
    return tuple(checked)


def ids_bytes(sample_ids: tuple[SampleId, ...]) -> bytes:
    r"""Ids as they go into a record's checksum: 64-bit integers, or texts with their lengths.

    >>> ids_bytes((1,)), ids_bytes(("a",))
    (b'\x01\x00\x00\x00\x00\x00\x00\x00', b'\x02\x00\x00\x00\x00\x00\x00\x00sa')
    """
    if fits_int64(sample_ids):
        return np.array(sample_ids, "<i8").tobytes()
    texts = [id_text(sample_id) for sample_id in sample_ids]
    return b"".join(struct.pack("<q", len(text)) + text for text in texts)


def record_numbers(ordinal: int, step: EncodedStep) -> bytes:
    """The numbers of a step as they go into its record's checksum."""
    errors = (step.pruning_error, step.rounding_error)
    head = (ordinal, step.optimizer, step.batch_size, step.seconds, int(step.status), len(step.sample_ids))
    return _NUMBERS.pack(*head, *errors, step.edited)


def record_crc(numbers: bytes, ids: Raw, entries: Raw, payload_crc: int) -> int:
    """CRC-32 of everything in a record: its ordinal, columns, ids, layer entries, and its payload's own CRC-32."""
    crc = zlib.crc32(entries, zlib.crc32(ids, zlib.crc32(numbers)))
    return zlib.crc32(struct.pack("<I", payload_crc), crc)


def encode_step(
    *,
    optimizer: int,
    sample_ids: tuple[SampleId, ...],
    batch_size: int,
    seconds: float,
    status: StepStatus,
    layers: Sequence[EncodedLayer],
    compression: Compression,
    pruning_error: float = math.nan,
    rounding_error: float = math.nan,
    edited: bool = False,
) -> EncodedStep:
    """Put the encoded layers of a step together."""
    rows = [
        (
            layer.layer,
            layer.kept,
            int(layer.index_codec),
            VALUE_CODES.index(layer.value_dtype),
            layer.scale,
            layer.index.size,
            layer.value.size,
        )
        for layer in layers
    ]
    payload = join_payload(layers, compression)
    return EncodedStep(
        optimizer,
        sample_ids,
        batch_size,
        seconds,
        status,
        np.array(rows, ENTRY),
        payload,
        pruning_error,
        rounding_error,
        edited,
    )


def encoded_layers(
    step: EncodedStep, signature: ModelSignature, compression: Compression, numbers: Collection[int] | None = None
) -> list[EncodedLayer]:
    """The layers of a step, each with its own bytes (views into the payload where it is not compressed).

    Args:
        step: The step.
        signature: Names and shapes of the layers.
        compression: How the payload was compressed.
        numbers: Only these layers.

    Raises:
        ValueError: entries and payload do not fit each other or the signature.
    """
    empty = np.empty(0, np.uint8)
    parts = []
    for number, kept, index_codec, value_code, scale, index_bytes, value_bytes in step.entries.tolist():
        if not (0 <= number < len(signature.layers) and value_code < len(VALUE_CODES)):
            raise ValueError(f"layer {number} with value code {value_code}")
        layer = EncodedLayer(number, kept, IndexCodec(index_codec), VALUE_CODES[value_code], scale, empty, empty)
        parts.append((layer, index_bytes, value_bytes))
    return split_payload(step.payload, parts, compression, numbers)


def decode_step(step: EncodedStep, signature: ModelSignature, compression: Compression) -> list[LayerDelta]:
    """The deltas of a step.

    Raises:
        ValueError: entries and payload do not fit each other or the signature.
    """
    return [
        decode_layer(layer, signature.layers[layer.layer].numel)
        for layer in encoded_layers(step, signature, compression)
    ]
