"""What a forgetting pass costs: seconds, memory of devices and host, and how much faster than retraining it was."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lightning_unlearn.utilities.checks import check_positive

__all__ = ["Cost", "measure_cost", "speedup"]

_running: list[Cost] = []
"""Measurements under way, outer ones first."""


@dataclass(slots=True)
class Cost:
    """What a block of code cost; filled in when :func:`measure_cost` is left.

    Attributes:
        seconds: Wall time, NaN while the block is running. Work that the block had put on a CUDA device is waited for.
        peak_cuda_bytes: Device, such as `"cuda:0"` -> most bytes that tensors took up on it at one time, those from
            before the block included. Of this process, and of torch's allocator: contexts and other libraries are not
            in it. Empty where no device was in use.
        peak_host_bytes: The most memory this process has had resident *since it started*, at the end of the block: all
            that an operating system tells without a watching thread. 0 while the block is running.
        host_growth_bytes: By how much the block raised that mark: at least so much it needed, and 0 where the process
            had needed more before. Measure in a fresh process for more than a lower bound.
    """

    seconds: float = math.nan
    peak_cuda_bytes: Mapping[str, int] = field(default_factory=dict)
    peak_host_bytes: int = 0
    host_growth_bytes: int = 0

    @property
    def minutes(self) -> float:
        """Wall time in minutes: the run-time efficiency (RTE) of tables of methods.

        >>> Cost(seconds=90.0).minutes
        1.5
        """
        return self.seconds / 60


@contextmanager
def measure_cost() -> Iterator[Cost]:
    """Measure what a block costs, in this process.

    Blocks may be nested. On a CUDA device torch's peak statistics are reset on entry, so whoever else reads
    `torch.cuda.max_memory_allocated` sees the peak since then. CUDA is not initialised by measuring.

    Yields:
        The cost, whose numbers are filled in on leaving the block, also by an exception.

    >>> with measure_cost() as cost:
    ...     total = sum(range(1000))
    >>> cost.seconds > 0, cost.peak_host_bytes > 0
    (True, True)
    """
    cost = Cost()
    _start_new_peaks()
    _running.append(cost)
    host = _resident_peak()
    started = time.perf_counter()
    try:
        yield cost
    finally:
        try:
            _synchronize()
            cost.seconds = time.perf_counter() - started
            cost.peak_host_bytes = _resident_peak()
            cost.host_growth_bytes = cost.peak_host_bytes - host
            _keep_peaks()
        finally:
            # By identity: measurements that are not finished yet may be equal.
            _running[:] = [other for other in _running if other is not cost]


def speedup(unlearning_seconds: float, retraining_seconds: float) -> float:
    """How many times faster unlearning was than retraining; below 1 it was slower.

    Raises:
        ValueError: a time is not positive.

    >>> speedup(2.0, 30.0)
    15.0
    """
    fast = check_positive("unlearning_seconds", unlearning_seconds)
    return check_positive("retraining_seconds", retraining_seconds) / fast


def _resident_peak() -> int:
    # In kilobytes, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _devices() -> list[int]:
    """CUDA devices on which this process has had tensors; asking the others would initialise them."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return [device for device in range(torch.cuda.device_count()) if torch.cuda.max_memory_allocated(device) > 0]


def _synchronize() -> None:
    for device in _devices():
        torch.cuda.synchronize(device)


def _keep_peaks() -> None:
    """Write the peaks since the last reset into every measurement under way."""
    peaks = {f"cuda:{device}": torch.cuda.max_memory_allocated(device) for device in _devices()}
    for cost in _running:
        known = dict(cost.peak_cuda_bytes)
        cost.peak_cuda_bytes = known | {name: max(peak, known.get(name, 0)) for name, peak in peaks.items()}


def _start_new_peaks() -> None:
    # What an outer block has reached so far would be lost with the reset.
    _keep_peaks()
    _synchronize()
    for device in _devices():
        torch.cuda.reset_peak_memory_stats(device)
