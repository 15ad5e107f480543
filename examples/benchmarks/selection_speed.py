"""How long exact selection takes on inputs that are easy, awkward or malicious, beside a partition and `torch.topk`.

    uv run python examples/benchmarks/selection_speed.py --json selection.json

One layer of 2.36 million entries (the largest of a ResNet-18), one thread, the fastest of several calls. None of the
inputs may take more than a small multiple of what Gaussian changes take.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from reporting import show, write_json

from lightning_unlearn.functional.selection import Selector

N = 512 * 512 * 9
Float32s = NDArray[np.float32]


def inputs() -> dict[str, Float32s]:
    """Name -> changes."""
    draw = np.random.default_rng(0)
    gauss = draw.standard_normal(N).astype(np.float32)
    weights = draw.standard_normal(N).astype(np.float32)
    sparse = gauss * (draw.random(N) < 0.05)
    hidden = np.abs(gauss)
    hidden[N // 2 :] *= np.float32(1e6)
    rising = np.sort(np.abs(gauss))
    return {
        "gauss": gauss,
        "95 % zeros": sparse,
        "all zero": np.zeros(N, np.float32),
        "first step of Adam": (weights + np.sign(gauss) * np.float32(1e-3)) - weights,
        "one magnitude": np.sign(gauss) * np.float32(1e-3),
        "bfloat16 weights": (torch.from_numpy(weights + gauss * 1e-2).bfloat16() - torch.from_numpy(weights).bfloat16())
        .float()
        .numpy(),
        "few values": np.round(gauss * 2),
        "rising": rising,
        "falling": rising[::-1].copy(),
        "second half a million times larger": hidden,
    }


def fastest(call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of the fastest call."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return 1000 * min(seconds)


def main() -> None:
    """Time every input, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="where to write the rows")
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    selector, zeros, k = Selector(), np.zeros(N, np.float32), math.ceil(args.keep * N)
    rows: list[dict[str, Any]] = []
    for name, change in inputs().items():
        tensor = torch.from_numpy(change)
        ours = fastest(lambda change=change: selector.select(change, zeros, k), args.repeats)  # type: ignore[misc]
        bits = np.abs(change).view(np.int32)
        rows.append(
            {
                "input": name,
                "keep": args.keep,
                "select_ms": ours,
                "of_gauss": ours / (rows[0]["select_ms"] if rows else ours),
                "partition_ms": fastest(lambda bits=bits: np.partition(bits, N - k), args.repeats),  # type: ignore[misc]
                "topk_ms": fastest(lambda tensor=tensor: tensor.abs().topk(k, sorted=False), args.repeats),  # type: ignore[misc]
            }
        )
    show(f"Selection of {k:,} of {N:,}", rows, list(rows[0]))
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
