"""A long recording with a real Trainer: does memory stay constant, and is the store still quick to open and intact?

    uv run python examples/benchmarks/long_recording.py --steps 100000 --json long.json

A small network is trained step by step with the recorder and a checkpoint every 5,000 steps. The table shows the
process's resident memory along the way; behind it stand size and number of segments of the store, the median time of
five fresh openings, a look-up, and what `verify` found. The memory of the same training without the recorder is
measured first, in a process of its own, so that what Lightning needs is not charged to us.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from reporting import show, write_json
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn import DeltaRecorder, DeltaStore

ROWS, FEATURES, CLASSES, BATCH = 6_400, 16, 4, 16
_PAGE = 2**20


def resident_mib() -> float:
    """Resident memory of this process, in MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024 / _PAGE


class Small(LightningModule):
    """A network of a few thousand weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Memory(Callback):
    """Notes the resident memory at every tenth of the run."""

    def __init__(self, steps: int) -> None:
        self._every = max(1, steps // 10)
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Look at every tenth."""
        if trainer.global_step % self._every == 0:
            self.seen.append((trainer.global_step, resident_mib()))


def train(directory: str, steps: int, keep: float, record: bool, every: int) -> tuple[list[tuple[int, float]], float]:
    """Train, and return memory along the way and seconds."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    x = torch.randn(ROWS, FEATURES)
    y = (x @ torch.randn(FEATURES, CLASSES)).argmax(1)
    memory = Memory(steps)
    callbacks: list[Callback] = [
        memory,
        ModelCheckpoint(dirpath=Path(directory) / "checkpoints", every_n_train_steps=every, save_top_k=1),
    ]
    if record:
        callbacks.append(DeltaRecorder(Path(directory) / "deltas", keep=keep))
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.fit(Small(), DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True))
    return memory.seen, time.perf_counter() - began


def inspect(url: Path) -> list[dict[str, Any]]:
    """What the finished store is like."""

    def seconds_to_open() -> float:
        began = time.perf_counter()
        DeltaStore.open(url)
        return time.perf_counter() - began

    def seconds_to_know() -> float:
        began = time.perf_counter()
        DeltaStore.open(url).steps_of(range(100))
        return time.perf_counter() - began

    files = [path for path in url.rglob("*") if path.is_file()]
    began = time.perf_counter()
    report = DeltaStore.open(url).verify()
    verified = time.perf_counter() - began
    return [
        {"what": "steps in the store", "value": DeltaStore.open(url).n_steps, "unit": "steps"},
        {"what": "size of the store", "value": sum(path.stat().st_size for path in files) / _PAGE, "unit": "MiB"},
        {"what": "segments", "value": sum("segment-" in path.name for path in files), "unit": "files"},
        {"what": "open", "value": statistics.median(seconds_to_open() for _ in range(5)), "unit": "s"},
        {"what": "open and find the steps of 100 ids", "value": statistics.median(seconds_to_know() for _ in range(5)),
         "unit": "s"},
        {"what": "verify", "value": verified, "unit": "s"},
        {"what": "verify found", "value": "nothing" if report.ok else str(report), "unit": "damage"},
    ]  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--checkpoint-every", type=int, default=5_000)
    parser.add_argument("--json", metavar="PATH")
    arguments = parser.parse_args()
    steps, every = arguments.steps, min(arguments.checkpoint_every, arguments.steps)
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool,
    ):  # a fresh process for each training
        plain, recorded = (
            pool.submit(train, f"{scratch}/{name}", count, arguments.keep, name == "recorded", every).result()
            for name, count in (("plain", max(10, steps // 10)), ("recorded", steps))
        )
        rows += [{"what": f"resident after {step:,} steps", "value": mib, "unit": "MiB"} for step, mib in recorded[0]]
        after = [(step, mib) for step, mib in recorded[0] if step > steps // 5]
        slope = float(np.polyfit(*zip(*after, strict=True), 1)[0]) if len(after) > 1 else 0.0
        rows += [
            {"what": "growth from a fifth on", "value": slope * 100_000, "unit": "MiB per 100,000 steps"},
            {"what": "resident without the recorder", "value": plain[0][-1][1], "unit": "MiB"},
            {"what": "training", "value": recorded[1], "unit": "s"},
            {"what": "a step with the recorder", "value": recorded[1] / steps * 1e3, "unit": "ms"},
            {"what": "a step without", "value": plain[1] / max(10, steps // 10) * 1e3, "unit": "ms"},
            *inspect(Path(scratch) / "recorded" / "deltas"),
        ]
    show(f"{steps:,} recorded steps", rows, ("what", "value", "unit"))
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
