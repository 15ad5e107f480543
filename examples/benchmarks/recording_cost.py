r"""What recording was predicted to cost, against what it cost: bytes and seconds of real trainings.

    uv run python examples/benchmarks/recording_cost.py --json recording_cost.json [--data-root FashionMNIST]
    uv run python examples/benchmarks/recording_cost.py --quick
    uv run python examples/benchmarks/recording_cost.py --fit

A run is an ordinary Trainer with a `DeltaRecorder`, in one process or in several that are joined by gloo and DDP, each
with one thread. Bytes are those of the files of the store. Seconds are the median, over steps, of the time inside the
recorder's hooks: before and after the optimizer's step, and at the start of the batch; of the rank for which that is
longest. They are predicted from rates that the same processes measured at the same time: by the wall clock right before
the training, and right after it by the time that the thread itself ran. The second leaves out what other programs of a
shared machine took, which in a small fraction of a second is a matter of luck.

`--fit` trains other models with other settings, and prints constants such as those of `store/expected_size.py` as they
follow from them: bytes of a compressed value, bytes of compressed positions against the entropy of the mask, and the
share of a layer that is left alone. None of these trainings is among the runs that the predictions are checked on.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from lightning import LightningModule, Trainer, seed_everything
from recording_cost_models import CHECKED, OPTIMIZERS, images
from recording_models import WORKLOADS, batches
from reporting import show, write_json
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unlearn import DeltaRecorder, DeltaStore
from lightning_unlearn.callbacks.delta_capture import DeltaCapture
from lightning_unlearn.callbacks.step_recording import StepRecording
from lightning_unlearn.deltas.recording_cost import RecordingCost, recording_cost
from lightning_unlearn.deltas.recording_plan import PlannedRecording
from lightning_unlearn.deltas.recording_rates import Rates
from lightning_unlearn.functional.pruning import kept_count, largest_entries
from lightning_unlearn.procedures.recording_rates import measure_rates
from lightning_unlearn.store.codec import encode_layer
from lightning_unlearn.store.compression import join_payload
from lightning_unlearn.store.expected_size import mask_entropy_bytes
from lightning_unlearn.store.step_encoder import StepEncoder
from lightning_unlearn.types import IndexCodec, LayerDelta, ValueDtype
from lightning_unlearn.utilities.parameters import model_signature

BATCH, SAMPLES = 32, 640
COLUMNS = ["model", "optimizer", "processes", "keep", "value_dtype", "compression", "predicted_mb", "measured_mb"]
COLUMNS += ["bytes_ratio", "predicted_ms", "measured_ms", "seconds_ratio", "watch_ratio", "select_ratio"]
COLUMNS += ["encode_ratio", "rest_ratio", "wall_predicted_ms", "wall_measured_ms", "wall_ratio", "wall_step_ms"]
Medians = dict[str, dict[str, float]]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "thread": time.thread_time}


@dataclass(frozen=True)
class Run:
    """One training, and what is recorded of it."""

    model: str
    optimizer: str
    processes: int = 1
    keep: Any = 0.1
    value_dtype: ValueDtype = "scaled_float16"
    compression: Any = None
    epochs: int = 2
    more: dict[str, Any] = field(default_factory=dict)


RUNS = [
    Run("mlp", "adam"),
    Run("mlp", "sgd", keep=1.0, value_dtype="float32", compression="zstd", epochs=1),
    Run("mlp", "nesterov", keep=0.02, value_dtype="int8", compression="zstd"),
    Run("vit", "adamw", keep=0.05, value_dtype="bfloat16", compression="zstd"),
    Run("vit", "adamw", keep=0.3, more={"anchor_every": 20}),
    Run("mobilenet", "rmsprop", keep=0.1, compression="zstd", more={"buffers": "record"}),
    Run("mobilenet", "adam", keep={"*.bias": 1.0, "*": 0.01}, value_dtype="float32"),
    Run("lstm", "adam", keep=0.2, value_dtype="int8", compression="zstd"),
    Run("adapters", "adamw", keep=1.0, value_dtype="float32"),
    Run("mlp", "nesterov", 2, keep=0.1, value_dtype="bfloat16", compression="zstd"),
    Run("vit", "adamw", 2, keep=0.1),
    Run("mobilenet", "rmsprop", 2, keep=0.05, value_dtype="int8"),
    Run("lstm", "adam", 2, keep=1.0, value_dtype="scaled_float16", compression="zstd", epochs=1),
    Run("mlp", "adam", 4, keep=0.05, value_dtype="float32", compression="zstd"),
    Run("vit", "sgd", 4, keep=0.1, value_dtype="bfloat16", compression="zstd"),
    Run("mobilenet", "adamw", 4, keep=0.2),
]


class Training(LightningModule):
    """Cross-entropy of a model, with the optimizer of a run."""

    def __init__(self, model: str, optimizer: str) -> None:
        super().__init__()
        self.net = CHECKED[model]()
        self.optimizer_name = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """What the run says."""
        return OPTIMIZERS[self.optimizer_name](p for p in self.parameters() if p.requires_grad)


@contextmanager
def timed() -> Iterator[dict[tuple[str, str], list[float]]]:
    """Seconds of every call of the recorder's parts, by clock and part."""
    places = {
        "watch": (DeltaCapture, "watch"),
        "select": (DeltaCapture, "changes"),
        "encode": (StepEncoder, "encode"),
        "record": (StepRecording, "_record"),
        "note": (StepRecording, "note_batch"),
    }
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    kept = {label: getattr(owner, name) for label, (owner, name) in places.items()}

    def wrap(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = {name: clock() for name, clock in CLOCKS.items()}
            try:
                return function(*args, **kwargs)
            finally:
                for name, clock in CLOCKS.items():
                    found[name, label].append(clock() - begin[name])

        return call

    for label, (owner, name) in places.items():
        setattr(owner, name, wrap(label, kept[label]))
    try:
        yield found
    finally:
        for label, (owner, name) in places.items():
            setattr(owner, name, kept[label])


def train(run: Run, folder: str, data_root: str | None) -> tuple[Medians, dict[str, Rates]]:
    """One rank of a run: median seconds of the parts of its hooks, and its rates, by each clock."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    seed_everything(0, verbose=False)
    model = Training(run.model, run.optimizer)
    recorder = DeltaRecorder(
        Path(folder) / "store", run.keep, value_dtype=run.value_dtype, compression=run.compression, **run.more
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    many = {"strategy": "ddp", "devices": run.processes} if run.processes > 1 else {"devices": 1}
    rates = {"wall": measure_rates(folder, repeats=3)}
    trainer = Trainer(
        max_epochs=run.epochs, callbacks=recorder, accelerator="cpu", enable_checkpointing=False, **quiet, **many
    )
    loader = DataLoader(images(run.model, SAMPLES, data_root), BATCH // run.processes, shuffle=True, drop_last=True)
    with timed() as found:
        begin = time.perf_counter()
        trainer.fit(model, loader)
        whole = time.perf_counter() - begin
    rates["thread"] = measure_rates(folder, repeats=3, clock=time.thread_time)
    medians: Medians = {name: {} for name in CLOCKS}
    for (name, label), seconds in found.items():
        # of looking for edits there is one more, as the training begins; the first steps allocate
        medians[name][label] = statistics.median(seconds[3:])
    for parts in medians.values():
        parts["hook"] = parts["watch"] + parts["record"] + parts["note"]
    medians["wall"]["step"] = whole / trainer.global_step
    return medians, rates


def rank_of(rank: int, run: Run, folder: str, data_root: str | None, answers: Any) -> None:
    """One process of a run."""
    os.environ.update({"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"})
    os.environ["OMP_NUM_THREADS"] = "1"
    if run.processes > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=Path(folder, "meeting").as_uri(), rank=rank, world_size=run.processes
        )
    try:
        answers.put((rank, train(run, folder, data_root)))
    except BaseException as error:
        answers.put((rank, repr(error)))  # or the run would wait for an answer that never comes
        raise
    if run.processes > 1:
        torch.distributed.destroy_process_group()


def planned(run: Run, store: DeltaStore, module: nn.Module) -> PlannedRecording:
    """The plan that somebody could have made before the run; the store only says how settings were resolved."""
    frozen = frozenset(name for name, parameter in module.named_parameters() if not parameter.requires_grad)
    return PlannedRecording(
        model_signature(module),
        store.settings,
        steps=run.epochs * (SAMPLES // BATCH),
        batch_size=BATCH,
        frozen=frozen,
        samples=SAMPLES,
        ranks=run.processes,
        checkpoints=run.epochs + 1,
        anchor_every=run.more.get("anchor_every"),
        optimizer_tensors={"sgd": 0, "nesterov": 1, "rmsprop": 1}.get(run.optimizer, 2),
    )


def check(run: Run, data_root: str | None) -> dict[str, Any]:
    """Train, and compare with what was predicted."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answers: Any = context.Queue()
        ranks = range(run.processes)
        processes = [context.Process(target=rank_of, args=(rank, run, folder, data_root, answers)) for rank in ranks]
        for process in processes:
            process.start()
        found = {}
        for _ in processes:
            rank, answer = answers.get(timeout=1200)
            if isinstance(answer, str):
                for process in processes:
                    process.terminate()
                raise SystemExit(f"Process {rank} of {run} failed: {answer}")
            found[rank] = answer
        for process in processes:
            process.join()
        store = DeltaStore.open(Path(folder) / "store")
        plan = planned(run, store, Training(run.model, run.optimizer))
        assert store.n_steps == plan.steps, f"{store.n_steps} steps instead of {plan.steps}"
        measured_bytes = sum(path.stat().st_size for path in Path(folder, "store").rglob("*") if path.is_file())
        costs = {
            name: {rank: recording_cost(plan, rates[name]) for rank, (_, rates) in found.items()} for name in CLOCKS
        }
    return row(run, costs, {rank: medians for rank, (medians, _) in found.items()}, measured_bytes)


def row(
    run: Run, costs: dict[str, dict[int, RecordingCost]], medians: dict[int, Medians], measured_bytes: int
) -> dict[str, Any]:
    """One line of the table."""
    found: dict[str, Any] = {
        "model": run.model,
        "optimizer": run.optimizer,
        "processes": run.processes,
        "keep": run.keep if isinstance(run.keep, float) else ", ".join(f"{k} {v}" for k, v in run.keep.items()),
        "value_dtype": run.value_dtype,
        "compression": run.compression,
    }
    size = costs["wall"][0].bytes.total
    found |= {"predicted_mb": size / 1e6, "measured_mb": measured_bytes / 1e6, "bytes_ratio": size / measured_bytes}
    for name, prefix, ratio in (("thread", "", "seconds_ratio"), ("wall", "wall_", "wall_ratio")):
        slow = max(medians, key=lambda rank: medians[rank][name]["hook"])
        mine = medians[slow][name]
        predicted = {rank: cost.seconds[rank] for rank, cost in costs[name].items()}
        expected = max(one.inline for one in predicted.values())
        found |= {f"{prefix}predicted_ms": 1e3 * expected, f"{prefix}measured_ms": 1e3 * mine["hook"]}
        found[ratio] = expected / mine["hook"]
        if name == "thread":
            rest = mine["record"] - mine["select"] - mine["encode"] + mine["note"]
            found |= {
                "watch_ratio": predicted[slow].watch / mine["watch"],
                "select_ratio": predicted[slow].select / mine["select"],
                "encode_ratio": (predicted[slow].encode + predicted[slow].compress) / mine["encode"],
                "rest_ratio": predicted[slow].other / rest,
            }
    found["wall_step_ms"] = 1e3 * max(one["wall"]["step"] for one in medians.values())
    return found


def fit() -> list[dict[str, Any]]:
    """Constants, from trainings that nothing is checked on."""
    rows: dict[tuple[float, str], list[float]] = defaultdict(list)
    masks, alone = [], []
    for name, optimizer_name, steps in [
        ("cnn", "momentum", 60),
        ("cnn", "adamw", 60),
        ("resnet18", "momentum", 10),
        ("transformer", "momentum", 12),
        ("transformer", "adamw", 12),
    ]:
        torch.manual_seed(0)
        model = WORKLOADS[name].model()
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        data = batches(WORKLOADS[name], torch.device("cpu"), None)
        for step in range(steps):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            x, y = data[step % len(data)]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        changes = [(after.detach() - old).flatten() for after, old in zip(model.parameters(), before, strict=True)]
        for keep in (0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0):
            kept = [pruned(number, change, keep) for number, change in enumerate(changes)]
            total = sum(delta.values.numel() for delta in kept)
            for value_dtype in get_args(ValueDtype):
                layers = [encode_layer(one, changes[one.layer].numel(), value_dtype) for one in kept]
                values = [replace(one, index=one.index[:0], index_codec=IndexCodec.DENSE) for one in layers]
                rows[keep, value_dtype].append(len(join_payload(values, "zstd")) / total)
            if keep < 1:
                positions = len(join_payload([replace(one, value=one.value[:0]) for one in layers], "zstd"))
                masks.append(
                    positions / sum(mask_entropy_bytes(one.values.numel(), changes[one.layer].numel()) for one in kept)
                )
            if keep == 0.01:  # where a byte of 255 seldom stands for anything else
                escapes = sum(one.index.size - one.kept for one in layers if one.index_codec is IndexCodec.GAP8)
                alone.append(255 * escapes / sum(map(len, changes)))
    found = [
        {
            "constant": f"{value_dtype}, keep {keep}",
            "value": statistics.median(some),
            "from": min(some),
            "to": max(some),
        }
        for (keep, value_dtype), some in rows.items()
    ]
    for label, some in [("positions / entropy", masks), ("left alone", alone)]:
        found.append({"constant": label, "value": statistics.median(some), "from": min(some), "to": max(some)})
    return found


def pruned(number: int, change: Tensor, keep: float) -> LayerDelta:
    """The largest entries of a layer."""
    kept = kept_count(change.numel(), keep)
    if kept == change.numel():
        return LayerDelta(number, None, change)
    places = largest_entries(change, kept)
    return LayerDelta(number, places, change[places])


def main() -> None:
    """Run, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="where to write the rows")
    parser.add_argument("--fit", action="store_true", help="print the constants instead")
    parser.add_argument("--runs", help="numbers of some of the runs, from 0 on, with commas between them")
    parser.add_argument("--quick", action="store_true", help="one run with one process, one with two")
    parser.add_argument(
        "--data-root", help="a folder with Fashion-MNIST as torchvision unpacks it, for the image models"
    )
    args = parser.parse_args()
    if args.fit:
        rows = fit()
        show("Constants", rows, ["constant", "value", "from", "to"])
    else:
        chosen = [0, 9] if args.quick else range(len(RUNS))
        if args.runs is not None:
            chosen = [int(number) for number in args.runs.split(",")]
        rows = []
        for run in (RUNS[number] for number in chosen):
            rows.append(check(run, args.data_root))
            write_json(args.json, rows)
        show("Predicted and measured", rows, COLUMNS)
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
