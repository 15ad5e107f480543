"""How much memory a planned recording takes on each rank."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_unlearn.deltas.recording_plan import Piece, PlannedRecording
from lightning_unlearn.deltas.recording_size import recorded_bytes, step_sizes
from lightning_unlearn.store.writer import SEGMENT_BYTES

__all__ = ["RecordingMemory", "recording_memory"]

_SELECTOR, _CANDIDATES = 1_300_000, 1 << 16
_DEPTH = 3


@dataclass(frozen=True, slots=True)
class RecordingMemory:
    """Bytes on one rank, beyond what the training takes.

    Attributes:
        previous: The recorded weights as they were after the last step, where the weights are.
        scratch: What selection needs there.
        pinned: Results of steps under way from an accelerator, in memory of the host that is not paged.
        pending: Deltas that wait to be encoded, on the host.
        writer: Records that are collected and published, on the host.
        start: On the host, as the recording begins and at every checkpoint: weights at the start, and where they are
            sharded all weights as they are, which the first rank gathers to recognise them.
        on_device: Whether `previous` and `scratch` are on an accelerator.
    """

    previous: float
    scratch: float
    pinned: float
    pending: float
    writer: float
    start: float
    on_device: bool

    @property
    def device(self) -> float:
        """Memory of the accelerator.

        >>> RecordingMemory(10.0, 5.0, 1.0, 2.0, 3.0, 9.0, True).device
        15.0
        """
        return self.previous + self.scratch if self.on_device else 0.0

    @property
    def host(self) -> float:
        """Memory of the host, throughout the training.

        >>> RecordingMemory(10.0, 5.0, 1.0, 2.0, 3.0, 9.0, True).host
        6.0
        """
        return self.pinned + self.pending + self.writer + (0.0 if self.on_device else self.previous + self.scratch)


def recording_memory(plan: PlannedRecording, threads: int) -> tuple[RecordingMemory, ...]:
    """Memory of each rank.

    Args:
        plan: What is recorded.
        threads: Threads that select together on a host.
    """
    written, found = recorded_bytes(plan), []
    gathered = sum(layer.numel * plan.itemsizes[layer.name] for layer in plan.signature.layers) if plan.sharded else 0
    away = plan.device == "cuda"

    def weights(pieces: tuple[Piece, ...]) -> tuple[int, int, int]:
        """Previous values, scratch, and one result."""
        kept = sum((4 if piece.is_whole else 8) * piece.kept for piece in pieces)
        scratch = _device_scratch(pieces, plan) + _DEPTH * kept if away else _host_scratch(pieces, plan, threads)
        return sum(piece.numel * piece.itemsize for piece in pieces), scratch, kept

    for rank, (held, size) in enumerate(zip(plan.per_rank(weights), step_sizes(plan), strict=True)):
        previous, scratch, kept = held
        record = size.positions + size.values + size.entries
        all_records = plan.stored_steps * record + written[rank].ids + written[rank].columns
        found.append(
            RecordingMemory(
                float(previous),
                float(scratch),
                float(_DEPTH * kept if away else 0),
                float(_DEPTH * kept if away else kept),
                min(2 * SEGMENT_BYTES + record, 2 * all_records),
                (written[0].initial + gathered) * float(rank == 0),
                away,
            )
        )
    return tuple(found)


def _device_scratch(pieces: tuple[Piece, ...], plan: PlannedRecording) -> int:
    """The largest layer's difference, and what selecting from it takes; all layers' where they are judged together."""
    pruned = [piece.numel for piece in pieces if not piece.is_whole]
    if plan.sharded:
        return _shard_scratch(pieces)
    return 26 * (sum(pruned) if plan.settings.scope == "global" else max(pruned, default=0))


def _host_scratch(pieces: tuple[Piece, ...], plan: PlannedRecording, threads: int) -> int:
    if plan.sharded:
        return _shard_scratch(pieces)
    if plan.settings.scope == "global":
        return 4 * sum(piece.numel for piece in pieces)
    whole = sum(4 * piece.numel for piece in pieces if piece.is_whole)
    other = max((4 * piece.numel for piece in pieces if not piece.is_whole and piece.itemsize != 4), default=0)
    candidates = max((piece.kept + piece.kept // 4 + _CANDIDATES for piece in pieces if not piece.is_whole), default=0)
    return whole + other + (threads * (_SELECTOR + 8 * candidates) if candidates else 0)


def _shard_scratch(pieces: tuple[Piece, ...]) -> int:
    """The change of everything that is here, and what selecting from the largest piece takes."""
    largest = max((piece.numel for piece in pieces if not piece.is_whole), default=0)
    return 4 * sum(piece.numel for piece in pieces) + 13 * largest
