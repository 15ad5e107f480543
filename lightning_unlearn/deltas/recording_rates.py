"""How fast a machine does what recording consists of: measured, or assumed and named so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_unlearn.types import ValueDtype
from lightning_unlearn.utilities.checks import check_positive, check_positive_int

__all__ = ["ASSUMED_DEVICE", "ASSUMED_NETWORK", "DEFAULT_RATES", "DeviceRates", "NetworkRates", "Rates"]


def _check_positive_fields(rates: Any) -> None:
    for item in fields(rates):
        value = getattr(rates, item.name)
        for name, number in value.items() if isinstance(value, Mapping) else [(item.name, value)]:
            if isinstance(number, float | int):
                check_positive(f"{item.name}[{name}]" if name != item.name else name, number)


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of a host for each piece of work, of one thread where nothing else is said.

    Attributes:
        origin: Where the figures come from.
        watch_entry: Looking whether an entry is what it was after the last step.
        watch_layer: The same, for each layer, however small.
        copy_entry: Remembering an entry of a step that is not watched.
        select_entry: Subtracting an entry, comparing it, and remembering it.
        select_kept: Taking an entry that is kept.
        select_layer: Each layer of more than 4096 entries, whose threshold is guessed from a sample.
        select_small_layer: Each smaller layer.
        difference_entry: Subtracting an entry of a layer that is kept whole, or that is no contiguous float32, on
            PyTorch's threads.
        shard_entry: Finding an entry's place in an exact selection over shards, without the network.
        encode_kept: Writing a kept entry's position as `GAP8` and its value, by value dtype.
        encode_whole: Writing the value of an entry of a layer that is kept whole, likewise.
        mask_entry: Each entry of a layer whose positions are a `BITMASK`, with the values of a quarter of them.
        encode_layer: Each layer.
        compress_byte: zstd, for each byte that goes in.
        publish_byte: Checksums of a segment, and writing and syncing it, for each byte.
        publish_file: Each segment.
        state_entry: Digest, norm and distance of the weights, for each entry, at every checkpoint.
        sample: Each sample id.
        step: Each step.
        threads: Threads that select together.
        thread_gain: How much faster they are than one.

    Raises:
        ValueError: a figure is not positive.
    """

    origin: str
    watch_entry: float
    watch_layer: float
    copy_entry: float
    select_entry: float
    select_kept: float
    select_layer: float
    select_small_layer: float
    difference_entry: float
    shard_entry: float
    encode_kept: Mapping[ValueDtype, float]
    encode_whole: Mapping[ValueDtype, float]
    mask_entry: float
    encode_layer: float
    compress_byte: float
    publish_byte: float
    publish_file: float
    state_entry: float
    sample: float
    step: float
    threads: int
    thread_gain: float

    def __post_init__(self) -> None:
        _check_positive_fields(self)
        check_positive_int("threads", self.threads)


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What is assumed of an accelerator; nothing here was measured by this project.

    Attributes:
        origin: Where the figures come from.
        memory_bandwidth: Bytes a second that kernels of one operation each reach.
        launch: Seconds of the training's thread for each kernel that it queues.
        host_link: Bytes a second to pinned memory.

    Raises:
        ValueError: a figure is not positive.
    """

    origin: str
    memory_bandwidth: float
    launch: float
    host_link: float

    def __post_init__(self) -> None:
        _check_positive_fields(self)


@dataclass(frozen=True, slots=True)
class NetworkRates:
    """What is assumed of the network between ranks; nothing here was measured by this project.

    Attributes:
        origin: Where the figures come from.
        bandwidth: Bytes a second that each rank sends and receives in a collective operation.
        latency: Seconds that a collective operation takes for each doubling of the number of ranks.

    Raises:
        ValueError: a figure is not positive.
    """

    origin: str
    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        _check_positive_fields(self)


ASSUMED_DEVICE = DeviceRates(
    origin="assumed, not measured: 1.2 TB/s of memory in small kernels, 5 us a launch, 20 GB/s to the host",
    memory_bandwidth=1.2e12,
    launch=5e-6,
    host_link=2e10,
)
"""A data-centre GPU of about 2 TB/s, of which kernels that do one thing each reach six tenths. An assumption."""

ASSUMED_NETWORK = NetworkRates(
    origin="assumed, not measured: 20 GB/s for each rank, 10 us for each doubling of the ranks",
    bandwidth=2e10,
    latency=1e-5,
)
"""A network of 200 Gbit/s for each accelerator. An assumption."""

DEFAULT_RATES = Rates(
    origin="by default: `measure_rates` on one thread of a shared server (AMD EPYC, AVX-512), medians of five calls",
    watch_entry=2.4e-10,
    watch_layer=6.7e-6,
    copy_entry=2e-10,
    select_entry=1.2e-9,
    select_kept=4.1e-9,
    select_layer=4e-5,
    select_small_layer=1.4e-5,
    difference_entry=1e-9,
    shard_entry=5.3e-9,
    encode_kept={"float32": 1.5e-9, "bfloat16": 1.6e-9, "scaled_float16": 1.7e-9, "int8": 1.8e-9},
    encode_whole={"float32": 3.5e-10, "bfloat16": 5.4e-10, "scaled_float16": 8.1e-10, "int8": 6.7e-10},
    mask_entry=5e-10,
    encode_layer=1.4e-5,
    compress_byte=1.8e-9,
    publish_byte=6.8e-10,
    publish_file=1.4e-3,
    state_entry=1.1e-8,
    sample=2.2e-8,
    step=2.5e-4,
    threads=1,
    thread_gain=1.0,
)
"""For plans that are made elsewhere than where the training will run. Orders of magnitude."""
