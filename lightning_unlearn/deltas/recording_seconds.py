"""How long recording takes in every step, by part, and what of it the training waits for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_unlearn.deltas.recording_plan import Piece, PlannedRecording
from lightning_unlearn.deltas.recording_rates import DeviceRates, NetworkRates, Rates
from lightning_unlearn.deltas.recording_size import piece_bytes, step_sizes
from lightning_unlearn.store.writer import SEGMENT_BYTES
from lightning_unlearn.types import IndexCodec
from lightning_unlearn.utilities.distributed import share_out

__all__ = ["PRUNED_KERNELS", "WHOLE_KERNELS", "RecordingSeconds", "network_bytes", "recording_seconds"]

_SMALL_LAYER = 4096
_ENTRIES_PER_THREAD = 1 << 19
_PASSES, _BINS = 3, 2048

PRUNED_KERNELS, WHOLE_KERNELS = 29, 12
"""Kernels queued for a layer that is pruned, and for one that is kept whole; counted, and held to by a test."""

PRUNED_BYTES, KEPT_BYTES, WHOLE_BYTES = 130, 60, 67
"""Device memory read and written for each entry of such layers, and for each kept one of a pruned layer. Counted from
the shapes of the operations; for `topk` four passes are assumed."""

_STEP_KERNELS = 10


@dataclass(frozen=True, slots=True)
class RecordingSeconds:
    """Seconds of one step on one rank.

    Attributes:
        watch: Looking for edits before the step.
        select: Subtracting, comparing, gathering, remembering; on an accelerator the larger of what its memory takes
            and what queueing takes.
        network: Reductions of a selection over shards.
        encode: Positions and values as bytes.
        compress: zstd.
        other: Ids and what every step costs.
        publish: Checksums, writing and syncing, beside the training.
        encodes_beside: Whether encoding happens in a thread of its own.
        checkpoint: At the end of every epoch and at every checkpoint: digest, norm and distance of the weights.
    """

    watch: float
    select: float
    network: float
    encode: float
    compress: float
    other: float
    publish: float
    encodes_beside: bool
    checkpoint: float

    @property
    def inline(self) -> float:
        """What the training waits for in each step.

        >>> RecordingSeconds(1.0, 2.0, 0.0, 4.0, 8.0, 0.5, 9.0, True, 7.0).inline
        3.5
        """
        beside = 0.0 if self.encodes_beside else self.encode + self.compress
        return self.watch + self.select + self.network + self.other + beside

    @property
    def beside(self) -> float:
        """What threads of the process do meanwhile; where it is longer than a step, the training waits for them.

        >>> RecordingSeconds(1.0, 2.0, 0.0, 4.0, 8.0, 0.5, 9.0, True, 7.0).beside
        12.0
        """
        return max(self.publish, self.encode + self.compress if self.encodes_beside else 0.0)


def network_bytes(plan: PlannedRecording) -> float:
    """Bytes that each rank sends in a step for a selection over shards: three histograms of every pruned layer.

    A reduction over `n` ranks in a ring sends `2 * (n - 1) / n` of what is reduced.
    """
    if not plan.sharded:
        return 0.0
    pruned = len({piece.layer.name for pieces in plan.pieces for piece in pieces if not piece.is_whole})
    return 2 * (plan.ranks - 1) / plan.ranks * pruned * 4 * _PASSES * _BINS


def recording_seconds(
    plan: PlannedRecording, rates: Rates, device: DeviceRates, network: NetworkRates
) -> tuple[RecordingSeconds, ...]:
    """Seconds of a step whose delta is stored, or of a mean one where not all are; for each rank.

    Args:
        plan: What is recorded.
        rates: Of the host.
        device: Of the accelerator; only looked at where the weights are on one.
        network: Between the ranks; only looked at where the weights are sharded.
    """
    sizes, found = step_sizes(plan), []
    reductions = 0.0
    if network_bytes(plan):
        latency = (_PASSES + 1) * network.latency * math.log2(plan.ranks)
        reductions = network_bytes(plan) / network.bandwidth + latency
    ids = plan.batch_size / plan.ranks
    stored = plan.watched
    away = plan.device == "cuda"
    chosen = plan.per_rank(lambda pieces: _on_device(pieces, device) if away else _on_host(pieces, plan.sharded, rates))
    encoded = plan.per_rank(lambda pieces: sum(_encode(piece, plan, rates) for piece in pieces))
    for (watch, select, skip), encode, size in zip(chosen, encoded, sizes, strict=True):
        compress = size.plain * rates.compress_byte if plan.settings.compression else 0.0
        written = size.positions + size.values + size.entries
        files = max(1.0, plan.steps * stored * written / SEGMENT_BYTES, float(plan.checkpoints)) / plan.steps
        found.append(
            RecordingSeconds(
                watch,
                stored * select + (1 - stored) * skip,
                stored * reductions,
                stored * encode,
                stored * compress,
                rates.step + rates.sample * ids,
                stored * written * rates.publish_byte + files * rates.publish_file,
                away,
                _checkpoint(plan, rates, device, network),
            )
        )
    return tuple(found)


def _on_host(pieces: Sequence[Piece], sharded: bool, rates: Rates) -> tuple[float, float, float]:
    """Watching, selecting, and remembering without selecting."""
    entries = sum(piece.numel for piece in pieces)
    watch = entries * rates.watch_entry + len(pieces) * rates.watch_layer
    # looked at again for a tensor of another kind: 16-bit weights get their difference in scratch first
    direct = [piece for piece in pieces if not piece.is_whole and piece.itemsize == 4 and not sharded]
    others = [piece for piece in pieces if piece.is_whole or piece.itemsize != 4 or sharded]
    each = [_selecting(piece, rates) for piece in direct]
    select = _shared_out(direct, each, rates)
    for piece in others:
        select += piece.numel * rates.difference_entry + rates.watch_layer
        if piece.is_whole:
            continue
        select += piece.numel * rates.shard_entry if sharded else _selecting(piece, rates)
    return watch, select, entries * rates.copy_entry + len(pieces) * rates.watch_layer


def _selecting(piece: Piece, rates: Rates) -> float:
    fixed = rates.select_layer if piece.numel > _SMALL_LAYER else rates.select_small_layer
    return piece.numel * rates.select_entry + piece.kept * rates.select_kept + fixed


def _shared_out(pieces: Sequence[Piece], seconds: Sequence[float], rates: Rates) -> float:
    """As the recorder shares layers out over threads; they slow each other down as was measured."""
    numels = [piece.numel for piece in pieces]
    count = min(rates.threads, max(1, sum(numels) // _ENTRIES_PER_THREAD), max(1, len(pieces)))
    loads = [0.0] * count
    for owner, one in zip(share_out(numels, count), seconds, strict=True):
        loads[owner] += one
    slowed = count / (1 + (rates.thread_gain - 1) * (count - 1) / max(1, rates.threads - 1))
    return max(loads) * slowed


def _on_device(pieces: Sequence[Piece], device: DeviceRates) -> tuple[float, float, float]:
    pruned = [piece for piece in pieces if not piece.is_whole]
    whole = [piece for piece in pieces if piece.is_whole]
    entries, n_whole = sum(piece.numel for piece in pruned), sum(piece.numel for piece in whole)
    moved = entries * PRUNED_BYTES + sum(piece.kept for piece in pruned) * KEPT_BYTES + n_whole * WHOLE_BYTES
    kernels = len(pruned) * PRUNED_KERNELS + len(whole) * WHOLE_KERNELS + _STEP_KERNELS
    copied = (entries + n_whole) * 24 / device.memory_bandwidth  # looked for edits, and remembered
    # Watching is part of both numbers: the kernels of a step are queued, and run, one after the other.
    return (
        0.0,
        max(moved / device.memory_bandwidth, kernels * device.launch),
        max(copied, len(pieces) * 4 * device.launch),
    )


def _encode(piece: Piece, plan: PlannedRecording, rates: Rates) -> float:
    codec = piece_bytes(piece, plan).codec
    if codec is IndexCodec.DENSE:
        return piece.kept * rates.encode_whole[piece.value_dtype] + rates.encode_layer
    each = rates.encode_kept[piece.value_dtype]
    if codec is IndexCodec.BITMASK:
        converting = max(0.0, each - rates.encode_kept["float32"])
        return piece.numel * rates.mask_entry + piece.kept * converting + rates.encode_layer
    return piece.kept * each + rates.encode_layer


def _checkpoint(plan: PlannedRecording, rates: Rates, device: DeviceRates, network: NetworkRates) -> float:
    """Of all parameters, by the first rank, which the others wait for; where they are sharded it gathers them first."""
    entries = sum(layer.numel for layer in plan.parameters)
    gathered = entries * 4 / network.bandwidth if plan.sharded else 0.0
    # Gathered weights are copied to the host once, others are read there for the digest and for the distance.
    fetched = (1 if plan.sharded else 2) * entries * 4 / device.host_link if plan.device == "cuda" else 0.0
    return entries * rates.state_entry + gathered + fetched
