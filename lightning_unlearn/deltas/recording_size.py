"""How many bytes a planned recording takes on disk, by part and by rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache

from lightning_unlearn.deltas.recording_plan import Piece, PlannedRecording
from lightning_unlearn.store.expected_size import LayerBytes, expected_layer_bytes, expected_record_bytes
from lightning_unlearn.store.writer import SEGMENT_BYTES

__all__ = ["RecordedBytes", "StepSize", "piece_bytes", "recorded_bytes", "step_sizes"]

_SEGMENT_HEAD = 2700
"""Bytes of a segment's header and of what the commit says of it."""

_SEVERAL = 7
"""Segments of one size class, at most, before they are merged."""

_LAYER_TEXT, _CHECKPOINT_TEXT, _DOCUMENTS = 120, 250, 1500
"""Bytes of JSON for each layer, for each state of the weights, and for the rest."""

_RANDOM_STATES = 14_000
"""Bytes of the states of random number generators in an anchor, on each rank."""

_bytes_of = lru_cache(maxsize=1 << 16)(expected_layer_bytes)


@dataclass(frozen=True, slots=True)
class StepSize:
    """What one rank writes of one step whose delta is stored.

    Attributes:
        positions: Bytes of positions.
        values: Bytes of values.
        entries: Bytes of descriptions of layers.
        plain: Bytes of positions and values before compression.
        kept: Number of kept entries.
    """

    positions: float
    values: float
    entries: float
    plain: float
    kept: int


@dataclass(frozen=True, slots=True)
class RecordedBytes:
    """Bytes of a store, by part.

    Attributes:
        positions: Where the kept entries are.
        values: What was added to them.
        entries: Descriptions of layers, 38 bytes for each layer of each step.
        ids: Ids, the index from ids to steps, and keys.
        columns: One number per step and column, headers of segments, documents.
        initial: Weights at the start.
        anchors: States of the training.
    """

    positions: float
    values: float
    entries: float
    ids: float
    columns: float
    initial: float
    anchors: float

    @property
    def deltas(self) -> float:
        """What `size_budget` counts: positions and values.

        >>> RecordedBytes(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0).deltas
        3.0
        """
        return self.positions + self.values

    @property
    def total(self) -> float:
        """The whole store."""
        return float(sum(getattr(self, part.name) for part in fields(self)))


def piece_bytes(piece: Piece, plan: PlannedRecording) -> LayerBytes:
    """Expected bytes of one layer of one step."""
    return _bytes_of(piece.kept, piece.numel, piece.value_dtype, plan.settings.compression)


def step_sizes(plan: PlannedRecording) -> tuple[StepSize, ...]:
    """What each rank writes of a step."""

    def size(pieces: tuple[Piece, ...]) -> StepSize:
        layers = [piece_bytes(piece, plan) for piece in pieces]
        return StepSize(
            sum(one.positions for one in layers),
            sum(one.values for one in layers),
            expected_record_bytes(len(layers), 0).entries,
            sum(one.plain for one in layers),
            sum(one.kept for one in layers),
        )

    return tuple(plan.per_rank(size))


def recorded_bytes(plan: PlannedRecording) -> tuple[RecordedBytes, ...]:
    """What each rank writes over the whole training; initial weights and documents are rank 0's.

    An upper bound where entries stay unchanged, since zeros are never stored; `size_budget` is not looked at.
    """
    found = []
    stored = sum(layer.numel * plan.itemsizes[layer.name] for layer in plan.stored_layers)
    trained = sum(layer.numel * plan.itemsizes[layer.name] for layer in plan.trained)
    documents = _DOCUMENTS + _LAYER_TEXT * len(plan.signature.layers) + _CHECKPOINT_TEXT * plan.checkpoints
    n_anchors = 0 if plan.anchor_every is None else plan.steps // plan.anchor_every
    ids, columns = _identity_bytes(plan)
    for rank, step in enumerate(step_sizes(plan)):
        deltas = plan.stored_steps * (step.positions + step.values + step.entries)
        segments = _segments(deltas + ids + columns, plan.checkpoints)
        state = (rank == 0) * (stored + plan.optimizer_tensors * trained) + _RANDOM_STATES
        found.append(
            RecordedBytes(
                plan.stored_steps * step.positions,
                plan.stored_steps * step.values,
                plan.stored_steps * step.entries,
                ids,
                columns + segments * _SEGMENT_HEAD + documents * (rank == 0),
                float(stored * (rank == 0)),
                n_anchors * state,
            )
        )
    return tuple(found)


def _identity_bytes(plan: PlannedRecording) -> tuple[float, float]:
    """Ids and columns of one rank, over the whole training."""
    ids = plan.batch_size / plan.ranks
    fresh = 1.0
    if plan.key_bytes is not None and plan.samples is not None:
        # a segment holds each key once; there are about as many as fit, and at least one for each flush
        seen = max(1.0, ids * plan.steps / max(1, plan.checkpoints))
        fresh = plan.samples * -math.expm1(-seen / plan.samples) / seen
    record = expected_record_bytes(0, ids, key_bytes=plan.key_bytes, fresh_keys=fresh)
    return plan.steps * record.ids, plan.steps * record.columns


def _segments(size: float, flushes: int) -> float:
    """Files: full ones, and what is left of merging those that were flushed early."""
    return max(1, math.ceil(size / SEGMENT_BYTES)) + min(_SEVERAL, max(0, flushes - 1))
