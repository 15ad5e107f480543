"""How many bytes a layer of a step will take, before anything is recorded.

Positions follow the rule by which they are written (`chosen_code`), for entries that lie as they did in measured
trainings: not evenly, since filters, rows and units differ in how much they change. Values have the width of their
dtype. What zstd leaves of both is the entropy of the mask, and a measured number of bytes for each value; its
constants depend on the training, as `docs/scaling.md` shows, and on nothing that could be computed beforehand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_unlearn.store.compression import Compression
from lightning_unlearn.store.id_index import INDEX_BLOCK
from lightning_unlearn.store.position_codes import chosen_code
from lightning_unlearn.store.records import ENTRY
from lightning_unlearn.store.segment import STEP_COLUMNS
from lightning_unlearn.store.value_codes import VALUE_WIDTHS
from lightning_unlearn.types import IndexCodec, ValueDtype

__all__ = ["LayerBytes", "StepBytes", "expected_layer_bytes", "expected_record_bytes", "mask_entropy_bytes"]

_LEFT_ALONE = 0.59
"""Share of a layer's entries in stretches of which nothing is kept. Measured, as what escapes of `GAP8` say of it."""

_MASK_FACTOR = 0.87
"""Bytes of compressed positions against the entropy of a mask with as many entries at random places. Measured."""

_KEEPS = (0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
_ZSTD_VALUE: dict[ValueDtype, tuple[float, ...]] = {
    "float32": (2.26, 2.24, 2.16, 2.26, 2.25, 2.27, 2.27),
    "bfloat16": (1.00, 0.98, 1.00, 1.06, 1.19, 1.28, 1.36),
    "scaled_float16": (1.38, 1.37, 1.37, 1.41, 1.46, 1.55, 1.65),
    "int8": (0.72, 0.69, 0.68, 0.70, 0.71, 0.70, 0.74),
}
"""Bytes of a compressed value where these fractions of a layer are kept: medians of `docs/recording-cost-fit.json`."""

_PART, _PART_BYTES = 1024, 60
"""Bytes from which a byte plane has a code table of its own, and what that table and its block take."""

_ESCAPE = 255
_OFFSETS = 3 * 8  # where a step's ids, layers and payload begin
_FENCE = 12  # first id and checksum of a block of the index


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What one layer of one step takes.

    Attributes:
        kept: Number of kept entries.
        codec: How their positions are written.
        positions: Bytes of positions in the file.
        values: Bytes of values in the file.
        plain: Bytes of both before compression.
    """

    kept: int
    codec: IndexCodec
    positions: float
    values: float
    plain: float


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What one step takes beside its positions and values, on one rank.

    Attributes:
        columns: One number per column, and the offsets.
        ids: Ids, the index from ids to steps, and the texts of keys.
        entries: Descriptions of layers.
    """

    columns: float
    ids: float
    entries: float


def mask_entropy_bytes(kept: int, numel: int) -> float:
    """Bytes that name `kept` of `numel` places, if each place is as likely as any other.

    >>> round(mask_entropy_bytes(100, 1000), 2), mask_entropy_bytes(1000, 1000)
    (58.62, 0.0)
    """
    share = kept / numel
    if share in (0.0, 1.0):
        return 0.0
    return -numel * (share * math.log2(share) + (1 - share) * math.log2(1 - share)) / 8


def expected_layer_bytes(kept: int, numel: int, value_dtype: ValueDtype, compression: Compression) -> LayerBytes:
    """Expected size of a layer of `numel` entries of which `kept` are stored.

    An upper bound where fewer entries change than are to be kept, because zeros are never stored: rows of an
    embedding that no sample touched, under an optimizer that leaves them alone.

    >>> expected_layer_bytes(10_000, 100_000, "scaled_float16", None).plain
    30231.0
    >>> expected_layer_bytes(100_000, 100_000, "float32", None).positions
    0.0
    """
    if not kept:
        return LayerBytes(0, IndexCodec.GAP8, 0.0, 0.0, 0.0)
    codec, positions = chosen_code(kept, numel, _expected_escapes(kept, numel))
    positions = float(round(positions))
    values = float(VALUE_WIDTHS[value_dtype] * kept)
    plain = positions + values
    if compression is not None:
        positions = min(positions, _in_parts(_MASK_FACTOR * mask_entropy_bytes(kept, numel), positions, 1))
        factor = float(np.interp(math.log(kept / numel), np.log(_KEEPS), _ZSTD_VALUE[value_dtype]))
        values = min(values, _in_parts(factor * kept, values, VALUE_WIDTHS[value_dtype]))
    return LayerBytes(kept, codec, positions, values, plain)


def expected_record_bytes(
    layers: int, ids: float, *, wide_ids: bool = False, key_bytes: int | None = None, fresh_keys: float = 1.0
) -> StepBytes:
    """Expected size of everything about a step but its positions and values, on one rank.

    Args:
        layers: Number of layers with a change.
        ids: Number of samples behind the step.
        wide_ids: Whether an integer id needs more than 32 bits.
        key_bytes: Bytes of a key in UTF-8, where ids are strings; they are then places in a table.
        fresh_keys: Share of the ids that the segment's table does not hold yet.

    >>> expected_record_bytes(62, 64)
    StepBytes(columns=70.0, ids=768.75, entries=2356.0)
    """
    columns = _OFFSETS + sum(np.dtype(code).itemsize for code in STEP_COLUMNS.values())
    per_id = 2 * (8 if wide_ids and key_bytes is None else 4) + 4 + _FENCE / INDEX_BLOCK
    if key_bytes is not None:
        # an offset, a letter that says what the text is, the text, and a checksum for each block
        per_id += fresh_keys * (8 + 1 + key_bytes + 4 / INDEX_BLOCK)
    return StepBytes(float(columns), per_id * ids, float(ENTRY.itemsize * layers))


def _expected_escapes(kept: int, numel: int) -> float:
    """Bytes of 255 in `GAP8`: for what is left alone, and for long gaps in the rest, where places are random."""
    share = min(1.0, kept / (numel * (1 - _LEFT_ALONE)))
    longer = (1 - share) ** _ESCAPE
    return _LEFT_ALONE * numel / _ESCAPE + kept * longer / (1 - longer)


def _in_parts(compressed: float, plain: float, planes: int) -> float:
    """Small parts share a table with what is beside them, and hardly shrink."""
    return compressed + _PART_BYTES * planes if plain >= _PART * planes else 0.97 * plain
