"""One recorded step as bytes, its checksums, and the tables that hold sample ids."""

from __future__ import annotations

import bisect
import struct
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_unlearn.store.codec import VALUE_CODES, EncodedLayer, decode_layer
from lightning_unlearn.store.compression import Compression, join_payload, split_payload
from lightning_unlearn.types import IndexCodec, LayerDelta, ModelSignature, SampleId, StepStatus
from lightning_unlearn.utilities.checks import expected

__all__ = [
    "ENTRY",
    "UNKNOWN_OPTIMIZER",
    "EncodedStep",
    "IdTable",
    "Ids",
    "check_ids",
    "decode_step",
    "encode_step",
    "record_crc",
]

Ids: TypeAlias = npt.NDArray[np.int64] | npt.NDArray[np.int32]

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

_INT64 = range(-(2**63), 2**63)


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
    """

    optimizer: int
    sample_ids: tuple[SampleId, ...]
    batch_size: int
    seconds: float
    status: StepStatus
    entries: npt.NDArray[Any]
    payload: bytes


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
        if isinstance(sample_id, str):
            checked.append(str(sample_id))
        elif not isinstance(sample_id, bool) and isinstance(sample_id, Integral):
            checked.append(int(sample_id))
        else:
            raise ValueError(expected("sample_ids", "integers or strings", sample_id, "Convert it before recording."))
    return tuple(checked)


def _id_text(sample_id: SampleId) -> bytes:
    kind = "s" if isinstance(sample_id, str) else "i"
    return f"{kind}{sample_id}".encode("utf-8", "surrogatepass")


def _text_id(text: bytes) -> SampleId:
    value = text[1:].decode("utf-8", "surrogatepass")
    return value if text[:1] == b"s" else int(value)


def _fits_int64(sample_ids: Collection[SampleId]) -> bool:
    return all(isinstance(sample_id, int) and sample_id in _INT64 for sample_id in sample_ids)


class IdTable:
    """Distinct ids of a segment that are not all 64-bit integers, sorted by their text; the place is the code.

    The text of an id is `s` and its UTF-8, or `i` and its decimal digits.

    Args:
        offsets: int64 of shape (n + 1,), where each text starts in `text`.
        text: uint8 of all texts, one after the other.
    """

    def __init__(self, offsets: npt.NDArray[np.int64], text: npt.NDArray[np.uint8]) -> None:
        self.offsets = offsets
        self.text = text
        self._bytes = text.tobytes()

    @classmethod
    def of(cls, sample_ids: Iterable[SampleId]) -> IdTable:
        """The table of these ids.

        >>> table = IdTable.of(["b", 7, "a", "b"])
        >>> table[0], table.codes(["b", "c", 7]).tolist()
        (7, [2, -1, 0])
        """
        texts = sorted({_id_text(sample_id) for sample_id in sample_ids})
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        return cls(offsets, np.frombuffer(b"".join(texts), np.uint8))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _text(self, code: int) -> bytes:
        return self._bytes[self.offsets[code] : self.offsets[code + 1]]

    def __getitem__(self, code: int) -> SampleId:
        if not 0 <= code < len(self):
            raise ValueError(f"code {code} in a table of {len(self)} ids")
        return _text_id(self._text(code))

    def codes(self, sample_ids: Iterable[SampleId]) -> npt.NDArray[np.int64]:
        """Code of each id, -1 where the table does not hold it."""
        found = []
        for text in map(_id_text, sample_ids):
            place = bisect.bisect_left(range(len(self)), text, key=self._text)
            found.append(place if place < len(self) and self._text(place) == text else -1)
        return np.array(found, np.int64)


def record_crc(ordinal: int, step: EncodedStep, payload_crc: int) -> int:
    """CRC-32 of everything in a record: its ordinal, columns, ids, layer entries, and its payload's own CRC-32."""
    numbers = (ordinal, step.optimizer, step.batch_size, step.seconds, int(step.status), len(step.sample_ids))
    crc = zlib.crc32(struct.pack("<qqqdqq", *numbers))
    if _fits_int64(step.sample_ids):
        crc = zlib.crc32(np.array(step.sample_ids, "<i8").tobytes(), crc)
    else:
        texts = [_id_text(sample_id) for sample_id in step.sample_ids]
        crc = zlib.crc32(b"".join(struct.pack("<q", len(text)) + text for text in texts), crc)
    crc = zlib.crc32(step.entries.tobytes(), crc)
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
    return EncodedStep(optimizer, sample_ids, batch_size, seconds, status, np.array(rows, ENTRY), payload)


def decode_step(step: EncodedStep, signature: ModelSignature, compression: Compression) -> list[LayerDelta]:
    """The deltas of a step.

    Raises:
        ValueError: entries and payload do not fit each other or the signature.
    """
    empty = np.empty(0, np.uint8)
    parts = []
    for entry in step.entries.tolist():
        number, kept, index_codec, value_code, scale, index_bytes, value_bytes = entry
        if not (0 <= number < len(signature.layers) and value_code < len(VALUE_CODES)):
            raise ValueError(f"layer {number} with value code {value_code}")
        layer = EncodedLayer(number, kept, IndexCodec(index_codec), VALUE_CODES[value_code], scale, empty, empty)
        parts.append((layer, index_bytes, value_bytes))
    return [
        decode_layer(layer, signature.layers[layer.layer].numel)
        for layer in split_payload(step.payload, parts, compression)
    ]
