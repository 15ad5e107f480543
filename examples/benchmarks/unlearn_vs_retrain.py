"""What does forgetting cost next to retraining, and what is left afterwards?

    uv run python examples/benchmarks/unlearn_vs_retrain.py --json unlearn.json [--data-root DATA]

1, 10 and 100 rows are going to ask, placed into the same batches (`SubjectGrouping`) or scattered. For each case a
small CNN is trained with and without the recorder; then the request is planned, its steps are subtracted, the model is
repaired, and another is retrained without the rows. Half of the rows that ask have wrong labels, so that there is
something to forget. Figures are medians over `--seeds`.

`DATA/FashionMNIST/raw` holds the four original idx files (10,000 images are used); without `--data-root` the digits of
scikit-learn are taken.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from reporting import show, write_json
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import FashionMNIST

from lightning_unlearn import (
    DeletionRequest,
    DeltaRecorder,
    DeltaStore,
    FineTune,
    PartialAmnesiac,
    Retrain,
    SubjectGrouping,
    unlearn,
)

BATCH, EPOCHS, REPAIR = 32, 8, 50
CASE = ("rows", "placement", "touched_percent")
COST = (
    *CASE, "train_seconds", "recorded_train_seconds", "plan_seconds", "subtract_seconds", "unlearn_seconds",
    "retrain_seconds", "speedup",
)  # fmt: skip
QUALITY = (*CASE[:2], "model", "forget_accuracy", "retain_accuracy", "test_accuracy", "kl_to_retrained")


class CNN(LightningModule):
    """A small convolutional network with BatchNorm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * (size // 2) ** 2, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def load(root: str | None) -> tuple[TensorDataset, TensorDataset]:
    """Training and test data, images (N, 1, s, s) in [0, 1]."""
    if root is None:
        digits = load_digits()
        x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = x[order], y[order]
        return TensorDataset(x[:1400], y[:1400]), TensorDataset(x[1400:], y[1400:])
    parts = [FashionMNIST(root, train=train) for train in (True, False)]
    both = [(part.data.float().unsqueeze(1) / 255, part.targets) for part in parts]
    return TensorDataset(*(t[:10_000] for t in both[0])), TensorDataset(*(t[:2_500] for t in both[1]))


@torch.no_grad()
def log_probabilities(model: nn.Module, data: TensorDataset, rows: Sequence[int] | None = None) -> Tensor:
    """Log-probabilities of the given rows."""
    x = data.tensors[0] if rows is None else data.tensors[0][list(rows)]
    model.eval()
    return torch.cat([functional.log_softmax(model(part), 1) for part in x.split(500)])


def accuracy(model: nn.Module, data: TensorDataset, rows: Sequence[int] | None = None) -> float:
    """Share of rows that get their label."""
    y = data.tensors[1] if rows is None else data.tensors[1][list(rows)]
    return float((log_probabilities(model, data, rows).argmax(1) == y).float().mean())


def timed_fit(model: LightningModule, data: TensorDataset, callbacks: list[Any]) -> float:
    """Train, and return the seconds."""
    trainer = Trainer(**settings(), callbacks=callbacks)
    began = time.perf_counter()
    trainer.fit(model, DataLoader(data, batch_size=BATCH, shuffle=True))
    return time.perf_counter() - began


def settings() -> dict[str, Any]:
    """Arguments of every Trainer."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, **quiet}


def one_case(size: int, grouped: bool, seed: int, root: str | None) -> list[dict[str, Any]]:
    """All figures for one size and placement: a row for each model."""
    train, test = load(root)
    seed_everything(seed, verbose=False)
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:size].tolist()
    labels = train.tensors[1].clone()
    labels[rows[::2]] = (labels[rows[::2]] + 1 + torch.arange(len(rows[::2])) % 9) % 10
    train = TensorDataset(train.tensors[0], labels)
    side = train.tensors[0].shape[-1]
    keys = ["asks" if row in set(rows) else f"row-{row}" for row in range(len(train))]
    grouping = [SubjectGrouping(keys)] if grouped else []

    def fresh() -> CNN:
        seed_everything(seed, verbose=False)
        return CNN(side)

    plain = timed_fit(fresh(), train, [*grouping])
    with tempfile.TemporaryDirectory() as scratch:
        model = fresh()
        recorded = timed_fit(model, train, [*grouping, DeltaRecorder(Path(scratch) / "deltas", sample_keys=keys)])
        store = DeltaStore.open(Path(scratch) / "deltas")
        began = time.perf_counter()
        plan = DeletionRequest(["asks"]).plan(store, model)
        planned = time.perf_counter() - began
        given: dict[str, Any] = {
            "data": {"train": DataLoader(train, batch_size=BATCH, shuffle=True)},
            "store": store, "sample_keys": keys, "record": False, "force": True, "seed": seed,
        }  # fmt: skip

        def timed(**arguments: Any) -> tuple[LightningModule, float]:
            began = time.perf_counter()
            result = unlearn(model, ["asks"], **{**given, **arguments})
            return result.model, time.perf_counter() - began

        subtracted, subtract_seconds = timed(method=PartialAmnesiac())
        repaired, unlearn_seconds = timed(
            method=PartialAmnesiac(), then=FineTune(max_steps=REPAIR), trainer={**settings(), "max_epochs": -1}
        )
        seed_everything(seed, verbose=False)
        retrained, retrain_seconds = timed(method=Retrain(), trainer={**settings(), "callbacks": list(grouping)})
    reference = log_probabilities(retrained, train, rows)
    retain = [row for row in range(len(train)) if row not in set(rows)]
    common = {
        "rows": size,
        "placement": "grouped" if grouped else "scattered",
        "touched_percent": 100 * plan.touched_fraction,
        "train_seconds": plain,
        "recorded_train_seconds": recorded,
        "retrain_seconds": retrain_seconds,
        "plan_seconds": planned,
        "subtract_seconds": subtract_seconds,
        "unlearn_seconds": unlearn_seconds,
        "speedup": retrain_seconds / unlearn_seconds,
    }
    models = {"original": model, "subtracted": subtracted, "subtracted + repair": repaired, "retrained": retrained}
    return [
        {
            **common,
            "model": name,
            "forget_accuracy": accuracy(one, train, rows),
            "retain_accuracy": accuracy(one, train, retain),
            "test_accuracy": accuracy(one, test),
            "kl_to_retrained": float(
                functional.kl_div(
                    log_probabilities(one, train, rows), reference, log_target=True, reduction="batchmean"
                )
            ),
        }
        for name, one in models.items()
    ]


def median_rows(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Row by row the median over runs."""
    return [
        {key: statistics.median(row[key] for row in same) if isinstance(value, float) else value
         for key, value in same[0].items()}
        for same in zip(*runs, strict=True)
    ]  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder with FashionMNIST/raw")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", metavar="PATH")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows: list[dict[str, Any]] = []
    one_case(arguments.sizes[0], True, 0, arguments.data_root)  # not counted: the first call of everything is slow
    for size in arguments.sizes:
        for grouped in (True, False):
            rows += median_rows([one_case(size, grouped, seed, arguments.data_root) for seed in range(arguments.seeds)])
    show("Cost of forgetting next to retraining", [row for row in rows if row["model"] == "retrained"], COST)
    show("What each model is like afterwards", rows, QUALITY)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
