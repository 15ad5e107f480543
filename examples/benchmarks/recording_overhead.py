r"""What recording costs a training step: our hook, the obvious ways to do the same, and the least that is possible.

    uv run python examples/benchmarks/recording_overhead.py --json overhead.json
    uv run python examples/benchmarks/recording_overhead.py --models resnet18 --quick
    uv run python examples/benchmarks/recording_overhead.py --device cuda --precision bf16-mixed \
        --models resnet50,vit_b_16 --json overhead-gpu.json

A machine's speed drifts by more than what is to be measured. So variants take turns in one run, in short blocks of real
steps of the real optimizer on one and the same model, and every block is compared with the blocks without recording
right before and after it; medians and interquartile ranges are over blocks. A Trainer cannot change what it records
from one step to the next, so the recorder's parts (`DeltaCapture`, and a writer into a real store on disk) are called
here as the recorder calls them. They run in the step, except that finished segments are published by the writer's
thread; segments are a quarter of their usual size, so that publishing has its share in this short a run.

Variants: `fast` is `value_dtype="scaled_float16"` without compression; `zstd` is `bfloat16` with it. `graves`
deep-copies the state dict before each step, and saves the dense difference with `torch.save`. `topk` keeps the largest
tenth of each layer by `torch.topk`, and saves that. `capture only` forms the difference, updates the previous copy, and
throws the difference away.

`hook_percent` is the time inside the hooks against the step without them; `run_ratio` the whole block against its
neighbours, and so it has in it what the hooks cost the step by evicting its data from the cache.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from recording_models import WORKLOADS, Workload, batches
from reporting import show, write_json
from torch import Tensor, nn

from lightning_unlearn import DeltaStore
from lightning_unlearn.callbacks.delta_capture import DeltaCapture
from lightning_unlearn.functional.pruning import kept_count
from lightning_unlearn.types import DataFingerprint, RecordingSettings
from lightning_unlearn.utilities.parameters import float_buffers, model_signature

SEGMENT_BYTES = 16 * 2**20
COLUMNS = ["model", "variant", "keep", "step_seconds", "hook_seconds", "hook_percent", "run_ratio", "run_ratio_iqr"]
COLUMNS += ["bytes_per_kept"]


class Off:
    """A training without recording; and what all variants are."""

    keep: float | None = None

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        self.model, self.optimizer, self.folder = model, optimizer, folder
        self.kept = self.bytes = 0

    def begin_block(self) -> None:
        """Take note of the weights that other variants have trained meanwhile; not timed."""

    def before(self) -> None:
        """Before the optimizer's step."""

    def after(self) -> None:
        """After the optimizer's step."""

    def close(self) -> None:
        """Finish what was written, and count its bytes."""


class Ours(Off):
    """The recorder's parts, writing into a store."""

    def __init__(self, *setup: Any, keep: float, value_dtype: Any, compression: Any) -> None:
        super().__init__(*setup)
        self.keep, self.step, self.last = keep, 0, time.perf_counter()
        settings = RecordingSettings(keep=keep, value_dtype=value_dtype, compression=compression)
        store = DeltaStore.create(
            self.folder,
            signature=model_signature(self.model),
            settings=settings,
            data=DataFingerprint("position", 50_000),
            initial={**dict(self.model.named_parameters()), **float_buffers(self.model)},
        )
        self.writer = store.writer(segment_bytes=SEGMENT_BYTES, background=_on_cuda(self.model) or "auto")
        self.capture = DeltaCapture(self.model, settings, share=not _on_cuda(self.model))
        self.capture.watch(self.optimizer)

    def begin_block(self) -> None:
        """Remember the weights."""
        self.capture.watch(self.optimizer)

    def before(self) -> None:
        """Look for edits."""
        self.capture.watch(self.optimizer)

    def after(self) -> None:
        """Select, encode and append."""
        self.step += 1
        change = self.capture.changes(self.optimizer, self.step, measure=self.step % 100 == 0)
        now = time.perf_counter()
        self.writer.append(
            optimizer=0,
            sample_ids=range(64),
            batch_size=64,
            seconds=now - self.last,
            deltas=change.deltas,
            pruning_error=change.pruning_error,
            edited=change.edited,
        )
        self.last = now

    def close(self) -> None:
        """Publish the rest."""
        self.writer.close()
        store = DeltaStore.open(self.folder)
        self.kept = sum(one.values.numel() for step in range(store.n_steps) for one in store.read(step).values())
        self.bytes = sum(path.stat().st_size for path in self.folder.rglob("segment-*"))


class CaptureOnly(Off):
    """The difference and the previous copy, with nothing done about them."""

    def __init__(self, *setup: Any) -> None:
        super().__init__(*setup)
        self.pairs = [(parameter.detach(), parameter.detach().clone()) for parameter in self.model.parameters()]
        largest = max(after.numel() for after, _ in self.pairs)
        self.scratch = torch.empty(largest, device=self.pairs[0][0].device)

    def begin_block(self) -> None:
        """Remember the weights."""
        for after, before in self.pairs:
            before.copy_(after)

    def after(self) -> None:
        """Subtract and copy."""
        for after, before in self.pairs:
            torch.sub(after, before, out=self.scratch[: after.numel()].view(after.shape))
            before.copy_(after)


class Graves(Off):
    """Dense: a deep copy of the state dict, a difference, `torch.save`."""

    def before(self) -> None:
        """Copy."""
        self.state = copy.deepcopy(self.model.state_dict())

    def after(self) -> None:
        """Subtract and save."""
        self.save({name: tensor - self.state[name] for name, tensor in self.model.state_dict().items()})

    def save(self, content: dict[str, Any]) -> None:
        """Write to a file and count, in the way one would: without a thought for crashes."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            torch.save(content, file)
            self.bytes += file.tell()
        self.kept += sum(len(value[1]) if isinstance(value, tuple) else value.numel() for value in content.values())


class TopK(Graves):
    """The largest tenth of each layer by `torch.topk`."""

    keep = 0.1

    def after(self) -> None:
        """Subtract, select and save."""
        content: dict[str, tuple[Tensor, Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            change = (parameter.detach() - self.state[name]).flatten()
            places = change.abs().topk(kept_count(change.numel(), 0.1), sorted=False).indices
            content[name] = (places.int(), change[places].half())
        self.save(content)


@dataclass
class Blocks:
    """Figures of one variant, one a block."""

    steps: list[float] = field(default_factory=list)
    hooks: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


def _on_cuda(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda


def variants(keeps: Sequence[float]) -> dict[str, Callable[..., Off]]:
    """Name -> what makes the variant from model, optimizer and folder."""

    def ours(keep: float, value_dtype: str, compression: str | None) -> Callable[..., Off]:
        return lambda *setup: Ours(*setup, keep=keep, value_dtype=value_dtype, compression=compression)

    made: dict[str, Callable[..., Off]] = {"capture only": CaptureOnly, "graves": Graves, "topk": TopK}
    for keep in keeps:
        made[f"fast @ {keep}"] = ours(keep, "scaled_float16", None)
        made[f"zstd @ {keep}"] = ours(keep, "bfloat16", "zstd")
    return made


def block(off: Off, steps: int, step: Callable[[], None], sync: Callable[[], None]) -> tuple[float, float]:
    """Seconds for each step, and of them those in the hooks."""
    off.begin_block()
    sync()
    hooks, begin = 0.0, time.perf_counter()
    for _ in range(steps):
        step()
        first = time.perf_counter()
        off.before()
        second = time.perf_counter()
        off.optimizer.step()
        third = time.perf_counter()
        off.after()
        hooks += time.perf_counter() - third + second - first
    sync()
    return (time.perf_counter() - begin) / steps, hooks / steps


def measure(name: str, workload: Workload, args: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """The rows of one model."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = workload.model().to(device)
    optimizer = workload.optimizer(model.parameters())
    data = itertools.cycle(batches(workload, device, args.data_root))
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    mixed = args.precision == "bf16-mixed"

    def step() -> None:
        x, y = next(data)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()

    def made(label: str, make: Callable[..., Off]) -> Off:
        folder = root / f"{name}-{''.join(filter(str.isalnum, label))}"
        if make in (Graves, TopK):
            folder.mkdir()
        return make(model, optimizer, folder)

    off = Off(model, optimizer, root)
    block(off, 2, step, sync)
    rivals = {label: made(label, make) for label, make in variants(args.keep).items()}
    for rival in rivals.values():
        block(rival, 1, step, sync)  # compiles, and touches every page
    figures = {label: Blocks() for label in rivals}
    steps, labels = args.steps_per_block or workload.steps, list(rivals)
    pairs = [labels[place : place + 2] for place in range(0, len(labels), 2)]
    plain = [block(off, steps, step, sync)[0]]
    for _ in range(args.blocks):
        # Two variants between two blocks of none: what drifts, drifts slower than that.
        for pair in pairs:
            taken = [block(rivals[label], steps, step, sync) for label in pair]
            plain.append(block(off, steps, step, sync)[0])
            for label, (whole, hooks) in zip(pair, taken, strict=True):
                figures[label].steps.append(whole)
                figures[label].hooks.append(hooks)
                figures[label].ratios.append(2 * whole / (plain[-1] + plain[-2]))
    base = statistics.median(plain)
    rows: list[dict[str, Any]] = [{**dict.fromkeys(COLUMNS), "model": name, "variant": "off", "step_seconds": base}]
    for label, rival in rivals.items():
        rival.close()
        found = figures[label]
        hook = statistics.median(found.hooks)
        quarters = statistics.quantiles(found.ratios, n=4) if len(found.ratios) > 1 else [found.ratios[0]] * 3
        rows.append(
            {
                "model": name,
                "variant": label.partition(" @ ")[0],
                "keep": rival.keep,
                "step_seconds": base,
                "hook_seconds": hook,
                "hook_percent": 100 * hook / base,
                "run_ratio": statistics.median(found.ratios),
                "run_ratio_iqr": quarters[2] - quarters[0],
                "bytes_per_kept": rival.bytes / rival.kept if rival.kept else None,
            }
        )
    return rows


def main() -> None:
    """Measure every model, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="where to write the rows")
    parser.add_argument("--models", default="resnet18,cnn,transformer", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--keep", default="0.01,0.1,0.3", help="fractions of every layer to keep")
    parser.add_argument("--blocks", type=int, default=7, help="blocks of every variant")
    parser.add_argument("--steps-per-block", type=int, help="2 for resnet18, 3 for transformer, 30 for cnn by default")
    parser.add_argument("--quick", action="store_true", help="one fraction, three short blocks; not for figures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument(
        "--data-root", help="a folder with CIFAR-10 as torchvision stores it, instead of synthetic data"
    )
    args = parser.parse_args()
    args.keep = [float(keep) for keep in args.keep.split(",")]
    if args.quick:
        args.keep, args.blocks, args.steps_per_block = args.keep[:2][-1:], 3, args.steps_per_block or 2
    print("Data:", args.data_root or "synthetic, with classes that can be learned")
    rows = []
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, WORKLOADS[name], args, Path(folder))
        show(f"Recording {name}", found, COLUMNS)
        rows += found
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
