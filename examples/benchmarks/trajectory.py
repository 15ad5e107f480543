"""How near to retraining does one come along the recorded weights, and at what cost?

    OMP_NUM_THREADS=1 uv run python examples/benchmarks/trajectory.py --json trajectory.json
    uv run python examples/benchmarks/tables.py docs/trajectory.md trajectory.json

Digits, batches of 32, recorded whole. Ten rows have wrong labels and are forgotten. The reference is the twin
of each run, `Retrain(order="recorded")`: same start, same batches, those rows left out.

- `weights` and `outputs`: L2 distance of the weights to the twin's, and mean KL divergence from its answers on test
  data, both relative to the untouched model (1: as if nothing had been done; 0: the twin).
- `seconds`: wall time of `unlearn`, relative to the twin's in the same run.
- `gradients`: samples that went through `training_step` to be differentiated, relative to the twin's. A Hessian product
  takes a second backward pass, which is not counted.

- `failed`: runs that ended in an error or in answers that are no numbers, because the weights had left those of the
  training too far; the other figures are medians over the rest of `--seeds`.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from reporting import show, write_json
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn import (
    Amnesiac,
    DeltaGrad,
    DeltaRecorder,
    DeltaStore,
    Retrain,
    SingleGradient,
    UnrolledInfluence,
    unlearn,
)
from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.functional.divergences import kl_to_reference

BATCH, TRAIN, FORGET = 32, 1280, list(range(10))
COLUMNS = ("model", "epochs", "touched_percent", "method", "weights", "outputs", "seconds", "gradients", "failed")
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def mlp() -> nn.Module:
    """A small network without normalisation."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


MODELS = {
    "softmax regression, SGD 0.1": (lambda: nn.Linear(64, 10), torch.optim.SGD, {"lr": 0.1, "weight_decay": 1e-3}),
    "MLP, SGD 0.1": (mlp, torch.optim.SGD, {"lr": 0.1}),
    "MLP, SGD 0.02, momentum 0.9": (mlp, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    "MLP, Adam 0.001": (mlp, torch.optim.Adam, {"lr": 1e-3}),
}


class Classifier(LightningModule):
    """One of the models; counts the samples of its training steps."""

    samples = 0

    def __init__(self, name: str) -> None:
        super().__init__()
        build, self.optimizer, self.settings = MODELS[name]
        self.net = build()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        Classifier.samples += len(batch[0])
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Constant rate."""
        return self.optimizer(self.parameters(), **self.settings)


def load(seed: int) -> tuple[TensorDataset, Tensor]:
    """Training data, of which the rows to forget have wrong labels, and test images."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    y[FORGET] = (y[FORGET] + 1) % 10
    return TensorDataset(x[:TRAIN], y[:TRAIN]), x[TRAIN:]


def flat(module: nn.Module) -> Tensor:
    """All weights as one vector."""
    return torch.cat([one.detach().flatten().double() for one in module.parameters()])


def one_run(name: str, epochs: int, seed: int) -> list[dict[str, Any]]:
    """All methods on one recorded training."""
    train, test = load(seed)
    seed_everything(seed, verbose=False)
    model = Classifier(name)
    arguments = {"max_epochs": epochs, "accelerator": "cpu", "devices": 1, **QUIET}

    def loader() -> DataLoader[Any]:
        return DataLoader(train, BATCH, shuffle=True)

    with tempfile.TemporaryDirectory() as scratch:
        url = str(Path(scratch) / "deltas")
        recorder = DeltaRecorder(url, keep=1.0, value_dtype="float32")
        Trainer(**arguments, callbacks=[recorder]).fit(model, loader())

        def timed(method: Any, **extra: Any) -> tuple[LightningModule, float, int]:
            before, began = Classifier.samples, time.perf_counter()
            settings = {"data": loader(), "store": url, "record": False, "force": True, "probe_samples": 0, **extra}
            found = unlearn(model, FORGET, method=method, **settings)
            return found.model, time.perf_counter() - began, Classifier.samples - before

        twin, retraining, counted = timed(Retrain(order="recorded"), trainer=arguments)
        methods = {
            "nothing": None,
            "Amnesiac": Amnesiac(),
            "SingleGradient": SingleGradient(lr=model.settings["lr"]),
            "UnrolledInfluence": UnrolledInfluence(max_change=None),
        }
        if model.optimizer is torch.optim.SGD:
            methods |= {
                "DeltaGrad": DeltaGrad(max_change=None),
                "DeltaGrad, period 5": DeltaGrad(period=5, max_change=None),
                "DeltaGrad, period 20": DeltaGrad(period=20, max_change=None),
                "DeltaGrad, period 5, max_curvature 1": DeltaGrad(period=5, max_curvature=1.0, max_change=None),
            }
        results: dict[str, tuple[LightningModule, float, int] | None] = {}
        for label, method in methods.items():
            try:
                results[label] = (model, 0.0, 0) if method is None else timed(method)
            except LightningUnlearnError:
                results[label] = None
        with torch.no_grad():
            reference = twin(test)
            apart = float((flat(model) - flat(twin)).norm())
            divergence = float(kl_to_reference(model(test), reference).mean())
            touched = len(DeltaStore.open(url).steps_of(FORGET))
            rows = []
            for label, result in results.items():
                row = {
                    "model": name,
                    "epochs": epochs,
                    "touched_percent": 100 * touched / (epochs * -(-TRAIN // BATCH)),
                    "method": label,
                }
                figures: dict[str, float | None] = dict.fromkeys(("weights", "outputs", "seconds", "gradients"))
                if result is not None:
                    one, seconds, samples = result
                    figures["weights"] = float((flat(one) - flat(twin)).norm()) / apart
                    figures["outputs"] = float(kl_to_reference(one(test), reference).mean()) / divergence
                    figures["seconds"], figures["gradients"] = seconds / retraining, samples / counted
                failed = result is None or not math.isfinite(figures["weights"] + figures["outputs"])
                figures = dict.fromkeys(figures) if failed else figures
                rows.append({**row, **figures, "failed": int(failed)})
    return rows


def median_rows(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Row by row the median over the runs that have a figure, and how many failed."""
    merged = []
    for same in zip(*runs, strict=True):
        row: dict[str, Any] = {}
        for key in same[0]:
            found = [one[key] for one in same if one[key] is not None]
            if key == "failed":
                row[key] = sum(found)
            else:
                row[key] = (
                    statistics.median(found) if found and isinstance(found[0], float) else next(iter(found), None)
                )
        merged.append(row)
    return merged


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", metavar="PATH")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows: list[dict[str, Any]] = []
    one_run("MLP, SGD 0.1", 1, 0)  # not counted: the first call of everything is slow
    for name in MODELS:
        for epochs in arguments.epochs:
            rows += median_rows([one_run(name, epochs, seed) for seed in range(arguments.seeds)])
    show("Along the recorded weights", rows, COLUMNS)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
