r"""What training for later unlearning costs: penalties as a share of a step, and one measurement of the monitor.

    uv run python examples/benchmarks/penalty_overhead.py --json penalties.json
    uv run python examples/benchmarks/penalty_overhead.py --models cnn --quick

One real Trainer trains one model; the callbacks are put in and taken out again in short blocks of steps that take
turns, and every block is compared with the blocks without any right before and after it: a machine's speed drifts by
more than what is to be measured. Medians and interquartile ranges are over blocks. `own term` is the same squared
distance written into the step with plain autograd. The monitor's row is one measurement: `share_percent` is for one
every 200 steps.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from recording_models import WORKLOADS, Workload, batches
from reporting import show, write_json
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unlearn import StandardDeviationPenalty, UnlearningErrorMonitor, WeightChangePenalty
from lightning_unlearn.callbacks.penalty import Penalty

COLUMNS = [
    "model",
    "variant",
    "step_seconds",
    "share_percent",
    "share_percent_iqr",
    "measurement_seconds",
    "iterations",
]
EVERY = 200


class OwnTerm(Penalty):
    """The squared distance as one would write it."""

    functional_form = ""

    def __init__(self) -> None:
        super().__init__(1e-4, schedule=None, name="own_term")
        self.pairs: list[tuple[nn.Parameter, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the weights once."""
        super().on_train_start(trainer, pl_module)
        self.pairs = self.pairs or [(one, one.detach().clone()) for one in pl_module.parameters()]

    def penalty(self, weight: float) -> Tensor:
        """Plain autograd."""
        return weight * torch.stack([(one - start).pow(2).sum() for one, start in self.pairs]).sum()


class Module(LightningModule):
    """A workload as a user's module."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.workload = workload.model(), workload

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The workload's."""
        return self.workload.optimizer(self.parameters())


class TakingTurns(Callback):
    """Puts variants in and out, block by block, and notes the seconds of the blocks."""

    def __init__(self, variants: dict[str, Penalty], steps: int, blocks: int) -> None:
        self.variants, self.steps = variants, steps
        one_round = [name for variant in variants for name in (variant, "off")]
        self.order = ["off", *itertools.chain.from_iterable([one_round] * blocks)]
        self.seconds: list[float] = []
        self._taken: list[float] = []
        self._inside: Penalty | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change places at the start of a block; begin to time."""
        warm_up = len(self.variants) + 1  # each variant once, so that copies and kernels are there
        block = (batch_idx - warm_up) // self.steps
        if batch_idx < warm_up:
            self._put_in(["off", *self.variants][batch_idx], trainer, pl_module)
        elif (batch_idx - warm_up) % self.steps == 0:
            if block == len(self.order):
                trainer.should_stop = True
            self._put_in(self.order[min(block, len(self.order) - 1)], trainer, pl_module)
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the seconds of the step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if batch_idx > len(self.variants):
            self._taken.append(time.perf_counter() - self._started)
            if len(self._taken) == self.steps:
                self.seconds.append(statistics.fmean(self._taken))
                self._taken = []

    def _put_in(self, name: str, trainer: Trainer, module: LightningModule) -> None:
        if self._inside is not None:
            self._inside.teardown(trainer, module, "fit")
        self._inside = self.variants.get(name)
        if self._inside is not None:
            self._inside.on_train_start(trainer, module)

    def rows(self, model: str) -> list[dict[str, Any]]:
        """One row a variant."""
        figures = list(zip(self.order, self.seconds, strict=False))
        base = statistics.median(seconds for name, seconds in figures if name == "off")
        rows: list[dict[str, Any]] = [{"model": model, "variant": "off", "step_seconds": base}]
        for variant in self.variants:
            places = [place for place, (name, _) in enumerate(figures) if name == variant and place + 1 < len(figures)]
            shares = [
                200 * self.seconds[place] / (self.seconds[place - 1] + self.seconds[place + 1]) - 100
                for place in places
            ]
            quarters = statistics.quantiles(shares, n=4) if len(shares) > 1 else [0.0, 0.0, 0.0]
            row = {"model": model, "variant": variant, "step_seconds": base * (1 + statistics.median(shares) / 100)}
            rows.append(
                {**row, "share_percent": statistics.median(shares), "share_percent_iqr": quarters[2] - quarters[0]}
            )
        return rows


def fit(workload: Workload, callbacks: list[Callback], args: argparse.Namespace, steps: int) -> None:
    """Train for some steps on a few batches again and again."""
    data = batches(workload, torch.device("cpu"), args.data_root)
    endless = [data[place % len(data)] for place in range(steps)]
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(Module(workload), DataLoader(endless, batch_size=None))  # type: ignore[arg-type]


def measure(name: str, workload: Workload, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model."""
    made: dict[str, Callable[[], Penalty]] = {
        "StandardDeviationPenalty": lambda: StandardDeviationPenalty(0.1),
        "WeightChangePenalty": lambda: WeightChangePenalty(1e-4),
        "own term": OwnTerm,
    }
    variants = {label: make() for label, make in made.items()}
    steps = args.steps_per_block or workload.steps
    turns = TakingTurns(variants, steps, args.blocks)
    binding = [one for one in variants.values() if isinstance(one, WeightChangePenalty)]

    class Bound(Callback):
        """What a Trainer that knows of these callbacks would call."""

        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for one in binding:
                one.on_fit_start(trainer, pl_module)

    fit(workload, [Bound(), turns], args, len(turns.order) * steps + len(variants) + 2)
    rows = turns.rows(name)
    if not args.no_monitor:
        monitor = UnlearningErrorMonitor(EVERY, max_iterations=args.max_iterations)
        fit(workload, [monitor], args, 2)
        record = monitor.history[0]
        share = 100 * record.seconds / (EVERY * rows[0]["step_seconds"])
        found = {"measurement_seconds": record.seconds, "iterations": record.iterations, "share_percent": share}
        rows.append({"model": name, "variant": f"UnlearningErrorMonitor({EVERY})", **found})
    return [{**dict.fromkeys(COLUMNS), **row} for row in rows]


def main() -> None:
    """Measure every model, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="where to write the rows")
    parser.add_argument("--models", default="resnet18,cnn", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--blocks", type=int, default=9, help="blocks of every variant")
    parser.add_argument("--steps-per-block", type=int, help="2 for resnet18, 30 for cnn by default")
    parser.add_argument("--quick", action="store_true", help="three short blocks; not for figures")
    parser.add_argument("--max-iterations", type=int, default=20, help="of the monitor's power iteration")
    parser.add_argument("--no-monitor", action="store_true")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--data-root", help="a folder with CIFAR-10 as torchvision stores it, else synthetic data")
    args = parser.parse_args()
    if args.quick:
        args.blocks, args.steps_per_block = 3, args.steps_per_block or 2
    rows = []
    for name in args.models.split(","):
        found = measure(name, WORKLOADS[name], args)
        show(f"Training {name} for later unlearning", found, COLUMNS)
        rows += found
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
