"""The store next to what the machine can do: writing, size, reading, subtraction, look-up.

    uv run python examples/benchmarks/store_throughput.py --json throughput.json [--data-root CIFAR10]

A ResNet-18 for small images is trained for a few dozen steps, and the changes of its last steps are what is stored: on
CIFAR-10 where `--data-root` has it, else on classes with a pattern in noise, which the title of the table then says.
Every row has its limit, measured in the same run and in the same unit:

| operation | limit |
|---|---|
| encode, append, decode | the bytes that go in and out, at the speed of a copy in memory |
| publish, compact | one raw write and fsync (and, for a merge, a read) of the same bytes |
| bytes per kept weight | entropy of positions and of every byte of the values, each drawn alone, layer by layer |
| sum | stored bytes, and a float64 read and written for each kept weight, at the speed of a copy |
| subtract | stored bytes at the speed of a copy; next to it a dense float32 delta by `torch.load` and `sub_` |
| look-up | `numpy.isin` over all ids in memory |
| open, verify | reading the bytes that must be read: from the page cache |
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording_models import WORKLOADS, batches
from reporting import machine, show, write_json
from throughput_limits import (
    best_seconds,
    copy_bandwidth,
    dense_file_seconds,
    entropy_bytes,
    mask_entropy_bytes,
    median_seconds,
    write_bandwidth,
)
from torch import Tensor, nn

from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.functional.kernels import KERNEL_VARIABLE
from lightning_unlearn.functional.pruning import kept_count, largest_entries
from lightning_unlearn.store.codec import VALUE_CODES, EncodedLayer, encode_layer, relative_rounding_error
from lightning_unlearn.store.compression import join_payload
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import DataFingerprint, LayerDelta, RecordingSettings, StepStatus
from lightning_unlearn.utilities.parameters import float_buffers, model_signature

KEEPS = (0.01, 0.1, 0.3)
BATCH = 64
COLUMNS = ("operation", "value", "unit", "limit")
Row = dict[str, Any]
Dense = dict[str, Tensor]


def train(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]], steps: int, kept: int) -> list[Dense]:
    """The changes of the last `kept` of some steps of real training, dense."""
    workload, changes = WORKLOADS["resnet18"], []
    optimizer = workload.optimizer(model.parameters())
    for step in range(steps):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step >= steps - kept:
            changes.append({name: after.detach() - before[name] for name, after in model.named_parameters()})
    return changes


def pruned(change: Dense, keep: float) -> list[LayerDelta]:
    """The largest entries of every layer."""
    deltas = []
    for number, dense in enumerate(change.values()):
        flat = dense.reshape(-1)
        chosen = largest_entries(flat, kept_count(flat.numel(), keep))
        deltas.append(LayerDelta(number, chosen, flat[chosen]))
    return deltas


def count(deltas: Sequence[LayerDelta]) -> int:
    """Number of kept weights."""
    return sum(delta.values.numel() for delta in deltas)


def encoded(deltas: Sequence[LayerDelta], numels: Sequence[int], value_dtype: Any) -> list[EncodedLayer]:
    """All layers of a step as bytes."""
    return [encode_layer(delta, numels[delta.layer], value_dtype) for delta in deltas]


def row(operation: str, value: float, unit: str, limit: float | None) -> Row:
    """One line of the result."""
    return {"operation": operation, "value": value, "unit": unit, "limit": limit}


def size_rows(steps: Sequence[Dense], numels: Sequence[int]) -> Iterator[Row]:
    """Bytes for each kept weight of real deltas, and what rounding costs."""
    for keep in KEEPS:
        deltas = [pruned(step, keep) for step in steps]
        kept = sum(map(count, deltas))
        positions = mask_entropy_bytes([one.values.numel() for one in deltas[0]], numels)
        for value_dtype in VALUE_CODES:
            layers = [encoded(one, numels, value_dtype) for one in deltas]
            planes = [(layer.kept, layer.value.reshape(layer.kept, -1).T) for step in layers for layer in step]
            limit = positions + sum(n * entropy_bytes(plane) for n, plane in planes) / kept
            for compression in (None, "zstd"):
                size = sum(len(join_payload(step, compression)) for step in layers) / kept
                name = f"size, keep {keep}, {value_dtype}, {compression or 'not compressed'}"
                yield row(name, size, "bytes per kept weight", limit)
            if keep == 0.1:
                error = relative_rounding_error(
                    pair for ones, step in zip(deltas, layers, strict=True) for pair in zip(ones, step, strict=True)
                )
                yield row(f"rounding error, keep {keep}, {value_dtype}", error, "relative L2", None)


def make_store(url: Path, model: nn.Module, **settings: Any) -> DeltaStore:
    """An empty store for the model."""
    return DeltaStore.create(
        url,
        signature=model_signature(model),
        settings=RecordingSettings(**{"keep": 0.1, **settings}),
        data=DataFingerprint("position", 50_000),
        initial={**dict(model.named_parameters()), **float_buffers(model)},
    )


def arguments(step: int, deltas: Sequence[LayerDelta]) -> dict[str, Any]:
    """What is appended for a step."""
    ids = list(range(step * BATCH, (step + 1) * BATCH))
    return {"optimizer": 0, "sample_ids": ids, "batch_size": BATCH, "seconds": 1.0, "deltas": deltas}


def write_rows(folder: Path, model: nn.Module, steps: Sequence[Dense], bandwidth: float) -> Iterator[Row]:
    """Encoding, appending and publishing at keep 0.1."""
    numels = [parameter.numel() for parameter in model.parameters()]
    deltas = [pruned(step, 0.1) for step in steps]
    for value_dtype, compression in (("scaled_float16", None), ("bfloat16", "zstd")):
        store = make_store(folder / "write", model, value_dtype=value_dtype, compression=compression)
        encoding = best_seconds(lambda dtype=value_dtype: encoded(deltas[0], numels, dtype), 9)
        payload = len(join_payload(encoded(deltas[0], numels, value_dtype), compression))
        moved = (12 * count(deltas[0]) + payload) / bandwidth
        name = f"{value_dtype}, {compression or 'not compressed'}"
        yield row(f"encode, {name}", 1e3 * encoding, "ms per record", 1e3 * moved)
        with store.writer(segment_bytes=2**40, background=False) as writer:
            times = []
            for step in range(20):
                started = time.perf_counter()
                writer.append(**arguments(step, deltas[step % len(deltas)]))
                times.append(time.perf_counter() - started)
            appending = min(times)
            yield row(f"append, encoding included, {name}", 1e3 * appending, "ms per record", 1e3 * moved)
            beyond = 1e3 * max(appending - encoding, 0.0)
            yield row(f"append, encoding not included, {name}", beyond, "ms per record", 2e3 * payload / bandwidth)
            yield row(f"append, {name}", payload / appending / 1e6, "MB/s", payload / moved / 1e6)
            started = time.perf_counter()
            writer.flush()
            seconds = time.perf_counter() - started
        store.refresh()
        size = store.reader.commits[0].segments[0].bytes
        yield row(f"publish, {name}", size / seconds / 1e6, "MB/s", write_bandwidth(folder, size) / 1e6)
        shutil.rmtree(folder / "write")
    for background in (False, "auto"):
        store = make_store(folder / "write", model)
        times = []
        with store.writer(background=background) as writer:
            for step in range(45):  # two publications of 64 MiB on the way
                started = time.perf_counter()
                writer.append(**arguments(step, deltas[step % len(deltas)]))
                times.append(time.perf_counter() - started)
                time.sleep(0.02)  # the training
        longest = 1e3 * max(times)
        yield row(f"longest append while publishing, background={background!r}", longest, "ms", 1e3 * min(times))
        shutil.rmtree(folder / "write")


def read_rows(folder: Path, model: nn.Module, steps: Sequence[Dense], bandwidth: float) -> Iterator[Row]:
    """Decoding, subtracting, verifying and merging 60 steps at keep 0.1."""
    numels = [parameter.numel() for parameter in model.parameters()]
    deltas, n_steps = [pruned(step, 0.1) for step in steps], 60
    store = make_store(folder / "read", model, value_dtype="scaled_float16")
    with store.writer(segment_bytes=2**24) as writer:
        for step in range(n_steps):
            writer.append(**arguments(step, deltas[step % len(deltas)]))
    store.refresh()
    stored = sum(ref.bytes for ref in store.reader.commits[0].segments)
    kept = sum(count(deltas[step % len(deltas)]) for step in range(n_steps))

    def read_all() -> None:
        for step in range(n_steps):
            store.read(step)

    seconds = best_seconds(read_all, 3)
    yield row("decode", kept / seconds / 1e6, "million kept weights/s", kept / ((stored + 12 * kept) / bandwidth) / 1e6)
    amounts = dict.fromkeys(range(n_steps), 1.0)
    limit = kept / ((stored + 16 * kept) / bandwidth) / 1e6
    threads = torch.get_num_threads()
    for kernel in ("numpy", "numba"):
        os.environ[KERNEL_VARIABLE] = kernel
        for number in sorted({1, threads}):
            torch.set_num_threads(number)
            seconds = best_seconds(lambda: accumulate(store, amounts), 4)
            name = f"sum of {n_steps} steps, {kernel}, {number} thread{'s' * (number > 1)}"
            yield row(name, kept / seconds / 1e6, "million kept weights/s", limit)
            yield row(name, (stored + 16 * kept) / seconds / 1e9, "GB/s", bandwidth / 1e9)
    del os.environ[KERNEL_VARIABLE]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    dense = dense_file_seconds(folder, steps[0], weights)
    moved = 12 * sum(numels) / bandwidth
    yield row("subtract one step, ours", 1e3 * seconds / n_steps, "ms", 1e3 * (stored / n_steps) / bandwidth)
    yield row("subtract one step, dense float32 file", 1e3 * dense, "ms", 1e3 * moved)
    read = best_seconds(lambda: [path.read_bytes() for path in (folder / "read").rglob("segment-*")], 3)
    opening = median_seconds(lambda: DeltaStore.open(store.url).reader.index, 9)
    heads = sum(ref.head_bytes for ref in store.reader.commits[0].segments)
    yield row("open", 1e3 * opening, "ms", 1e3 * read * heads / stored)
    yield row("verify", stored / best_seconds(store.verify, 3) / 1e6, "MB/s", stored / read / 1e6)
    writing = stored / write_bandwidth(folder, 2**26)
    started = time.perf_counter()
    store.compact()
    seconds = time.perf_counter() - started
    yield row("compact", stored / seconds / 1e6, "MB/s", stored / (read + writing) / 1e6)
    shutil.rmtree(folder / "read")


def look_up_rows(folder: Path, n_ids: int) -> Iterator[Row]:
    """Steps of 1,000 ids among very many recorded ones; 64 ids a step, no deltas."""
    store, rng, samples = make_store(folder / "ids", nn.Linear(1, 1)), np.random.default_rng(0), max(n_ids // 100, 1000)
    n_steps = n_ids // BATCH
    everything = rng.integers(0, samples, (n_steps, BATCH), dtype=np.int32)
    started = time.perf_counter()
    with store.writer() as writer:
        for ids in everything:
            writer.append(
                optimizer=0,
                sample_ids=ids.tolist(),
                batch_size=BATCH,
                seconds=1.0,
                deltas=None,
                status=StepStatus.UNWATCHED,
            )
    recording = (time.perf_counter() - started) / n_steps
    yield row(f"record {n_steps:,} steps of {BATCH} ids, no delta", 1e6 * recording, "us per step", None)
    asked = rng.choice(samples, 1000, replace=False)
    scan = best_seconds(lambda: np.flatnonzero(np.isin(everything, asked).any(1)), 1)
    started = time.perf_counter()
    opened = DeltaStore.open(store.url)
    n = opened.n_steps
    opening = time.perf_counter() - started
    started = time.perf_counter()
    steps = opened.steps_of(asked.tolist())
    looking = time.perf_counter() - started
    if n != n_steps or not np.array_equal(steps, np.flatnonzero(np.isin(everything, asked).any(1))):
        raise SystemExit("The index did not find what a search through all ids finds.")
    yield row(f"open, {n_ids:,} ids", 1e3 * opening, "ms", None)
    yield row(f"steps of 1,000 ids among {n_ids:,}", 1e3 * looking, "ms", 1e3 * scan)
    shutil.rmtree(folder / "ids")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH", help="where to write the rows")
    parser.add_argument("--data-root", help="folder in which torchvision stored CIFAR-10")
    parser.add_argument("--steps", type=int, default=36, help="steps of training before deltas are taken")
    parser.add_argument("--ids", type=int, default=100_000_000, help="recorded ids for the look-up; 0 leaves it out")
    parser.add_argument("--folder", help="where to write the stores (default: a temporary folder)")
    options = parser.parse_args()
    torch.manual_seed(0)
    workload = WORKLOADS["resnet18"]
    model = workload.model()
    steps = train(model, batches(workload, torch.device("cpu"), options.data_root), options.steps, 3)
    numels = [parameter.numel() for parameter in model.parameters()]
    bandwidth = copy_bandwidth()
    rows = [row("copy in memory", bandwidth / 1e9, "GB/s", None)]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        rows += write_rows(folder, model, steps, bandwidth)
        rows += read_rows(folder, model, steps, bandwidth)
        rows += size_rows(steps, numels)
        rows += look_up_rows(folder, options.ids) if options.ids else []
    data = "CIFAR-10" if options.data_root else "synthetic classes"
    show(f"Store: ResNet-18 on {data}, {machine()['processor']}", rows, COLUMNS)
    write_json(options.json, rows)


if __name__ == "__main__":
    main()
