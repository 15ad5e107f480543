"""What the machine itself can do, measured in the run that it is the limit of."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = [
    "best_seconds",
    "copy_bandwidth",
    "dense_file_seconds",
    "entropy_bytes",
    "mask_entropy_bytes",
    "median_seconds",
    "write_bandwidth",
]

_COPY_BYTES = 2**26


def _times(function: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return times


def best_seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    """Shortest of several times: what disturbs a measurement only ever makes it longer."""
    return min(_times(function, repeats))


def median_seconds(function: Callable[[], Any], repeats: int = 9) -> float:
    """Median of several times."""
    return float(np.median(_times(function, repeats)))


def copy_bandwidth() -> float:
    """Bytes moved per second (read and written) by torch's threads, between buffers larger than the caches."""
    source, target = torch.zeros(_COPY_BYTES, dtype=torch.uint8), torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    return 2 * _COPY_BYTES / best_seconds(lambda: target.copy_(source), 9)


def write_bandwidth(folder: Path, size: int) -> float:
    """Bytes per second of one write and one fsync of a new file."""
    data, path = os.urandom(size), folder / "raw"

    def write() -> None:
        with open(path, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        path.unlink()

    return size / median_seconds(write, 5)


def mask_entropy_bytes(kept: Sequence[int], numels: Sequence[int]) -> float:
    """Bytes for each kept entry that no code of the positions can go below, were they drawn independently."""
    bits = 0.0
    for count, numel in zip(kept, numels, strict=True):
        share = count / numel
        bits += sum(-numel * p * math.log2(p) for p in (share, 1 - share) if 0 < p < 1)
    return bits / 8 / sum(kept)


def entropy_bytes(planes: npt.NDArray[np.uint8]) -> float:
    """Bytes for each value that no code of single bytes can go below: the entropy of every byte plane."""
    total = 0.0
    for plane in planes:
        counts = np.bincount(plane, minlength=256)
        shares = counts[counts > 0] / plane.size
        total += float(-(shares * np.log2(shares)).sum()) / 8
    return total


def dense_file_seconds(folder: Path, deltas: dict[str, Tensor], weights: dict[str, Tensor]) -> float:
    """Seconds to take one dense float32 delta off the weights, from a file of its own in the page cache."""
    torch.save(deltas, folder / "dense.pt")

    def apply() -> None:
        for name, delta in torch.load(folder / "dense.pt").items():
            weights[name].sub_(delta)

    return best_seconds(apply)
