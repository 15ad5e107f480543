r"""What recording costs each of two DDP processes: all layers on both, or to each its share of them.

    uv run python examples/benchmarks/shared_recording.py --json shared_recording.json
    uv run python examples/benchmarks/shared_recording.py --model cnn --quick

Two gloo processes of one thread each train one model under DDP, in one fit of a real Trainer. Three modes take turns in
it, in short blocks of steps, backwards in every second round: `off`; `all layers`, where each process records the whole
model, into a store of its own; and `shared`, where each records its share of the layers, into one store: what
`DeltaRecorder` does. A Trainer cannot change what it records from one step to the next, so the recorder's parts
(`DeltaCapture`, and a writer into a real store on disk) are called here as the recorder calls them.

`hook_seconds` is the time in the hooks before and after the optimizer's step, median over blocks, for each process;
`hook_ratio` is that of a block against the block of `all layers` in the same round, median and interquartile range.
`copy_megabytes` is the copy of the weights that is held from step to step, `entries` the weights it is of.
`step_seconds` is the whole step, hooks included: DDP lets the faster process wait for the slower one.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from recording_models import WORKLOADS, batches
from reporting import show, write_json
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unlearn import DeltaStore
from lightning_unlearn.callbacks.before_change import look_before_change
from lightning_unlearn.callbacks.delta_capture import DeltaCapture
from lightning_unlearn.types import DataFingerprint, RecordingSettings
from lightning_unlearn.utilities.parameters import float_buffers, model_signature

WORLD = 2
MODES = ("off", "all layers", "shared")
SEGMENT_BYTES = 16 * 2**20
COLUMNS = ["model", "mode", "rank", "entries", "copy_megabytes", "step_seconds", "hook_seconds", "hook_percent"]
COLUMNS += ["hook_ratio", "hook_ratio_iqr"]


class Module(LightningModule):
    """A workload as a user's module, with as many samples of a batch as are asked for."""

    def __init__(self, name: str, batch_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.workload, self.batch_size = WORKLOADS[name], batch_size
        self.model = self.workload.model()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return nn.functional.cross_entropy(self.model(x[: self.batch_size]), y[: self.batch_size])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The workload's."""
        return self.workload.optimizer(self.parameters())


class Recording:
    """The recorder's parts in one mode: a capture of this process's layers, and a writer."""

    def __init__(self, model: nn.Module, folder: Path, keep: float, rank: int, world: int) -> None:
        settings = RecordingSettings(keep=keep)
        self.capture = DeltaCapture(model, settings, rank=rank, world_size=world)
        mine = self.capture.untouched().values()  # nothing has been looked at yet
        self.entries = sum(one.numel() for one in mine)
        self.copy_bytes = sum(one.numel() * one.element_size() for one in mine)
        if rank == 0 or world == 1:
            DeltaStore.create(
                folder,
                signature=model_signature(model),
                settings=settings,
                data=DataFingerprint("position", 50_000),
                initial={**dict(model.named_parameters()), **float_buffers(model)},
                world_size=world,
            )
        dist.barrier()
        self.writer = DeltaStore.open(folder).writer(rank, segment_bytes=SEGMENT_BYTES)
        self.step = 0

    def record(self, optimizer: torch.optim.Optimizer, batch_size: int, seconds: float) -> None:
        """Select, encode and append."""
        change = self.capture.changes(optimizer, self.step, measure=self.step % 100 == 10)
        self.writer.append(
            optimizer=0,
            sample_ids=range(batch_size),
            batch_size=batch_size,
            seconds=seconds,
            deltas=change.deltas,
            pruning_error=change.pruning_error,
            edited=change.edited,
        )
        self.step += 1


class TakingTurns(Callback):
    """Records in the mode whose turn it is, and notes the seconds of every block."""

    def __init__(self, steps: int, rounds: int, keep: float, batch_size: int, folder: Path) -> None:
        self.steps, self.keep, self.batch_size, self.folder = steps, keep, batch_size, folder
        self.order = [mode for number in range(rounds) for mode in (MODES if number % 2 == 0 else MODES[::-1])]
        self.warm_up = 2 * len(MODES)  # each mode twice, so that kernels are compiled and every page was touched
        self.blocks: list[tuple[float, float]] = []
        self._taken: list[tuple[float, float]] = []
        self._mode, self._hook = MODES[0], 0.0

    @property
    def total(self) -> int:
        """Number of steps."""
        return self.warm_up + self.steps * len(self.order)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One thread for each process; a process that ends with its group aborts now and then."""
        torch.set_num_threads(1)
        atexit.register(dist.destroy_process_group)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make both recordings, and listen to the optimizer."""
        rank = trainer.global_rank
        self.recordings = {
            "all layers": Recording(pl_module, self.folder / f"all-{rank}", self.keep, 0, 1),
            "shared": Recording(pl_module, self.folder / "shared", self.keep, rank, WORLD),
        }
        optimizer = trainer.optimizers[0]
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change places at the start of a block; what other modes have trained meanwhile is looked at untimed."""
        place = batch_idx - self.warm_up
        mode = MODES[batch_idx % len(MODES)] if place < 0 else self.order[place // self.steps]
        if mode != self._mode and mode in self.recordings:
            self.recordings[mode].capture.watch(trainer.optimizers[0])
        self._mode, self._hook = mode, 0.0
        dist.barrier()  # what one process did untimed is not to be waited for by the other, timed
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the seconds of the step, and those of the hooks in it."""
        if batch_idx >= self.warm_up:
            self._taken.append((time.perf_counter() - self._started, self._hook))
        if len(self._taken) == self.steps:
            self.blocks.append(
                (statistics.fmean(a for a, _ in self._taken), statistics.fmean(b for _, b in self._taken))
            )
            self._taken = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the figures of both processes together, and leave them in a file: this process ends with the fit."""
        for recording in self.recordings.values():
            recording.writer.close()
        size = {mode: (one.entries, one.copy_bytes) for mode, one in self.recordings.items()}
        found: list[Any] = [None] * WORLD
        dist.all_gather_object(found, (size, self.blocks))
        if trainer.is_global_zero:
            (self.folder / "figures.json").write_text(json.dumps(found))

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        recording = self.recordings.get(self._mode)
        if recording is None:
            return None
        begin = time.perf_counter()
        recording.capture.meet(optimizer)
        self._hook += time.perf_counter() - begin
        return look_before_change(optimizer, args, kwargs, self._timed(lambda: recording.capture.watch(optimizer)))

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        recording = self.recordings.get(self._mode)
        if recording is not None:
            seconds = time.perf_counter() - self._started
            self._timed(lambda: recording.record(optimizer, self.batch_size, seconds))()

    def _timed(self, function: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            begin = time.perf_counter()
            function()
            self._hook += time.perf_counter() - begin

        return run


def rows_of(model: str, found: list[Any], order: list[str]) -> list[dict[str, Any]]:
    """One row for each mode and process."""
    rows: list[dict[str, Any]] = []
    for mode in MODES:
        for rank, (size, blocks) in enumerate(found):
            by_mode = {one: [block for block, now in zip(blocks, order, strict=True) if now == one] for one in MODES}
            steps, hooks = ([block[side] for block in by_mode[mode]] for side in (0, 1))
            row = {"model": model, "mode": mode, "rank": rank, "step_seconds": statistics.median(steps)}
            if mode in size:
                base = statistics.median(block[0] for block in by_mode["off"])
                row |= {"entries": size[mode][0], "copy_megabytes": size[mode][1] / 1e6}
                row |= {"hook_seconds": statistics.median(hooks)}
                row |= {"hook_percent": 100 * statistics.median(hooks) / base}
            if mode == "shared":
                ratios = [mine / whole[1] for mine, whole in zip(hooks, by_mode["all layers"], strict=True)]
                quarters = statistics.quantiles(ratios, n=4)
                row |= {"hook_ratio": statistics.median(ratios), "hook_ratio_iqr": quarters[2] - quarters[0]}
            rows.append({**dict.fromkeys(COLUMNS), **row})
    return rows


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One fit on two processes, and its rows."""
    workload = WORKLOADS[args.model]
    with tempfile.TemporaryDirectory() as folder:
        turns = TakingTurns(args.steps_per_block, args.rounds, args.keep, args.batch_size, Path(folder))
        data = batches(workload, torch.device("cpu"), args.data_root)
        endless = [data[place % len(data)] for place in range(turns.total * WORLD)]
        trainer = Trainer(
            accelerator="cpu",
            devices=WORLD,
            strategy=DDPStrategy(start_method="spawn", process_group_backend="gloo"),
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[turns],
        )
        trainer.fit(Module(args.model, args.batch_size), DataLoader(endless, batch_size=None))  # type: ignore[arg-type]
        found = json.loads((Path(folder) / "figures.json").read_text())
    return rows_of(args.model, found, turns.order)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="where to write the rows")
    parser.add_argument("--model", default="resnet18", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--batch-size", type=int, default=16, help="samples of each process")
    parser.add_argument("--keep", type=float, default=0.1, help="fraction of every layer to keep")
    parser.add_argument("--rounds", type=int, default=15, help="blocks of every mode")
    parser.add_argument("--steps-per-block", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="three short blocks of each mode; not for figures")
    parser.add_argument("--data-root", help="a folder with CIFAR-10 as torchvision stores it, else synthetic data")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 3
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    rows = measure(args)
    show(f"Recording {args.model} on {WORLD} processes", rows, COLUMNS)
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
