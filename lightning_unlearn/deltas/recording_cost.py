"""What recording a training will cost, before it is run: bytes, seconds, memory, and which steps a deletion touches."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from lightning_unlearn.deltas.recording_memory import RecordingMemory, recording_memory
from lightning_unlearn.deltas.recording_plan import PlannedRecording
from lightning_unlearn.deltas.recording_rates import (
    ASSUMED_DEVICE,
    ASSUMED_NETWORK,
    DEFAULT_RATES,
    DeviceRates,
    NetworkRates,
    Rates,
)
from lightning_unlearn.deltas.recording_seconds import RecordingSeconds, network_bytes, recording_seconds
from lightning_unlearn.deltas.recording_size import RecordedBytes, StepSize, recorded_bytes, step_sizes

__all__ = ["RecordingCost", "recording_cost", "touched_share"]


@dataclass(frozen=True, slots=True)
class RecordingCost:
    """What a recording costs.

    Attributes:
        plan: What is recorded.
        ranks: Bytes that each rank writes over the whole training.
        step: Bytes of each rank for a step whose delta is stored.
        seconds: Of a mean step, for each rank.
        memory: Of each rank.
        network_bytes: What each rank sends in a step for the selection.
        assumptions: What the figures rest on, in words.
    """

    plan: PlannedRecording
    ranks: tuple[RecordedBytes, ...]
    step: tuple[StepSize, ...]
    seconds: tuple[RecordingSeconds, ...]
    memory: tuple[RecordingMemory, ...]
    network_bytes: float
    assumptions: tuple[str, ...]

    @property
    def bytes(self) -> RecordedBytes:
        """Of all ranks together, by part."""
        return RecordedBytes(
            *(math.fsum(getattr(rank, part.name) for rank in self.ranks) for part in fields(RecordedBytes))
        )

    @property
    def step_bytes(self) -> float:
        """Of all ranks together, for the delta of one step."""
        return math.fsum(rank.positions + rank.values + rank.entries for rank in self.step)

    @property
    def kept(self) -> int:
        """Entries that are stored of one step, at most."""
        return sum(rank.kept for rank in self.step)

    @property
    def slowest(self) -> RecordingSeconds:
        """Seconds of the rank that the others wait for."""
        return max(self.seconds, key=lambda one: one.inline)

    @property
    def beside(self) -> float:
        """Seconds of a step that the busiest rank's threads work beside the training."""
        return max(one.beside for one in self.seconds)

    def share_of(self, step_seconds: float) -> float:
        """What the training takes longer, as a share of a step: what is done inline, and where threads fall behind."""
        waited = max(0.0, self.beside - step_seconds - self.slowest.inline)
        return (self.slowest.inline + waited) / step_seconds


def recording_cost(
    plan: PlannedRecording,
    rates: Rates = DEFAULT_RATES,
    device: DeviceRates = ASSUMED_DEVICE,
    network: NetworkRates = ASSUMED_NETWORK,
) -> RecordingCost:
    """What a planned recording costs. Pure: nothing is read, run or measured.

    Bytes are expectations for layers whose entries change at random, and an upper bound where many do not change at
    all. They were within a fifth of what was written in trainings that the constants do not come from, and seconds on a
    CPU with a core for each process within a factor of two: `docs/scaling.md`. Seconds on an accelerator, and what a
    selection over shards takes, rest on assumptions and were not checked.

    >>> from lightning_unlearn.types import LayerInfo, ModelSignature, RecordingSettings
    >>> signature = ModelSignature((LayerInfo("weight", (1000, 1000), "float32"),))
    >>> plan = PlannedRecording(signature, RecordingSettings(keep=0.1), steps=1000, batch_size=32)
    >>> cost = recording_cost(plan)
    >>> cost.kept, round(cost.step_bytes / cost.kept, 2), round(cost.bytes.total / 1e6)
    (100000, 3.02, 307)
    """
    assumptions = [f"Host: {rates.origin}."]
    if plan.device == "cuda":
        assumptions.append(f"Accelerator: {device.origin}.")
    if plan.sharded:
        assumptions.append(f"Network: {network.origin}.")
        assumptions.append("Weights that are sharded: modelled, not checked against a recording.")
        if plan.device == "cuda":
            assumptions.append("Selection from shards on an accelerator: counted as that from whole layers.")
    if plan.settings.compression:
        assumptions.append("Compression: medians over five trainings, which single ones miss by up to a third.")
    return RecordingCost(
        plan,
        recorded_bytes(plan),
        step_sizes(plan),
        recording_seconds(plan, rates, device, network),
        recording_memory(plan, rates.threads),
        network_bytes(plan),
        tuple(assumptions),
    )


def touched_share(steps_per_epoch: float, samples: int) -> float:
    """Expected share of the steps whose batch holds one of so many samples, which lie in batches at random.

    In every epoch each sample is in one step. How many epochs there are does not matter, and of one sample it is only
    the batch that does.

    >>> round(touched_share(5004, 1), 6), round(touched_share(625, 1000), 3)
    (0.0002, 0.798)
    """
    if steps_per_epoch <= 1:
        return 1.0
    return -math.expm1(samples * math.log1p(-1 / steps_per_epoch))
