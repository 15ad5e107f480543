"""When does delta subtraction forget, and when does it only damage? A study on Fashion-MNIST.

One training per optimizer and seed watches several forget sets: 1, 10 and 100 samples, clean and mislabelled, placed
at random or grouped into the same batches, each beside an innocent set of the same size and placement (the placebo).
Every set is then forgotten in several ways and compared with a retrained twin: same initial weights, same order,
forgotten samples left out.

    uv run python examples/forgetting_study.py --data-root DATA --output docs/forgetting-study

`DATA/FashionMNIST/raw` holds the four original idx files, plain or gzipped. `--download` fetches them instead.
Finished runs are kept in `OUTPUT.json`, so an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.progress import Progress
from study_tables import PLACEBOS, write_tables
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import FashionMNIST

from lightning_unlearn import Amnesiac, DeltaRecorder, FineTune, PartialAmnesiac, SubjectGrouping, unlearn
from lightning_unlearn.callbacks.leave_out import LeaveOut
from lightning_unlearn.exceptions import UnlearningWarning
from lightning_unlearn.procedures.compare import compare_models

EPOCHS = 6
BATCH = 64
TRAIN, TEST = 10_000, 2_500


@dataclass(frozen=True)
class ForgetSet:
    """Rows that are asked to be forgotten together."""

    name: str
    size: int
    grouped: bool
    mislabelled: bool
    rows: tuple[int, ...]
    placebo: tuple[int, ...]


class FashionCNN(LightningModule):
    """A convolutional network with BatchNorm, 106 k parameters."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        """SGD 0.03 with momentum 0.9 and cosine, or AdamW 1e-3."""
        if self.hparams["optimizer"] == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=1e-3)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)
        steps = EPOCHS * math.ceil(TRAIN / BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class FashionData(LightningDataModule):
    """10,000 training images in an order of their own per seed; the forget sets carry what they carry."""

    def __init__(self, arrays: Mapping[str, Tensor], seed: int) -> None:
        super().__init__()
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(arrays["train_y"]), generator=generator)[:TRAIN]
        self.images, self.true_labels = arrays["train_x"][chosen], arrays["train_y"][chosen]
        self.sets = forget_sets()
        self.labels = self.true_labels.clone()
        for item in self.sets:
            if item.mislabelled:
                rows = list(item.rows)
                self.labels[rows] = (self.labels[rows] + 1) % 10
        self.test = TensorDataset(arrays["test_x"][:TEST], arrays["test_y"][:TEST])

    @property
    def subjects(self) -> list[str | None]:
        """Grouped sets and their placebos as subjects; everything else is nobody's."""
        subjects: list[str | None] = [None] * TRAIN
        for item in self.sets:
            for kind, rows in (("", item.rows), ("-placebo", item.placebo)):
                for row in rows if item.grouped else ():
                    subjects[row] = item.name + kind
        return subjects

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled; the grouping callback decides the order by seed and epoch."""
        return DataLoader(TensorDataset(self.images, self.labels), BATCH, shuffle=True)

    def evaluation(self, rows: Sequence[int]) -> dict[str, DataLoader[Any]]:
        """Forget set, 2,500 retain images that no set holds, test images."""
        taken = {row for item in self.sets for row in (*item.rows, *item.placebo)}
        free = [row for row in range(TRAIN) if row not in taken][:TEST]

        def part(chosen: Sequence[int]) -> DataLoader[Any]:
            index = list(chosen)
            return DataLoader(TensorDataset(self.images[index], self.labels[index]), 512)

        return {"forget": part(rows), "retain": part(free), "test": DataLoader(self.test, 512)}


def forget_sets() -> list[ForgetSet]:
    """Disjoint rows for every combination; one sample has no grouped row."""
    found, start = [], 0
    for grouped in (False, True):
        for mislabelled in (False, True):
            for size in (1, 10, 100):
                if grouped and size == 1:
                    continue
                name = f"{'grouped' if grouped else 'random'}-{'poison' if mislabelled else 'clean'}-{size}"
                rows = tuple(range(start, start + size))
                placebo = tuple(range(start + size, start + 2 * size))
                found.append(ForgetSet(name, size, grouped, mislabelled, rows, placebo))
                start += 2 * size
    return found


def load(root: Path, download: bool) -> dict[str, Tensor]:
    """Images scaled to [0, 1] and labels, from torchvision's folder layout; gzipped idx files are read as they are."""
    if download:
        FashionMNIST(str(root), download=True)

    def read(name: str, header: int) -> np.ndarray[Any, Any]:
        plain = root / "FashionMNIST" / "raw" / name
        data = plain.read_bytes() if plain.exists() else gzip.decompress(plain.with_name(f"{name}.gz").read_bytes())
        return np.frombuffer(data, np.uint8, offset=header)

    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read(f"{prefix}-images-idx3-ubyte", 16).reshape(-1, 1, 28, 28)
        arrays[f"{split}_x"] = torch.from_numpy(images.copy()).float() / 255
        arrays[f"{split}_y"] = torch.from_numpy(read(f"{prefix}-labels-idx1-ubyte", 8).copy()).long()
    return arrays


def train(data: FashionData, optimizer: str, seed: int, *callbacks: Any) -> tuple[FashionCNN, float]:
    """One training; batches are arranged by (data seed, epoch), so twins see the same order."""
    seed_everything(seed, verbose=False)
    model = FashionCNN(optimizer)
    grouping = SubjectGrouping(data.subjects, seed=data.seed)
    started = time.perf_counter()
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[grouping, *callbacks],
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return model, time.perf_counter() - started


METHODS: dict[str, tuple[Any, Any]] = {
    "amnesiac": (Amnesiac(), None),
    "amnesiac + repair": (Amnesiac(), FineTune(max_steps=50)),
    "partial amnesiac": (PartialAmnesiac(keep=0.1), None),
    "partial amnesiac + repair": (PartialAmnesiac(keep=0.1), FineTune(max_steps=50)),
    "partial amnesiac, share": (PartialAmnesiac(keep=0.1, scale="share"), None),
    "fine-tune only": (FineTune(max_steps=50), None),
}


def run(root: Path, download: bool, optimizer: str, seed: int) -> list[dict[str, Any]]:
    """All sets of one original: a list of flat rows."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore", UnlearningWarning)
    arrays = load(root, download)
    data = FashionData(arrays, seed)
    folder = Path(tempfile.mkdtemp(prefix="forgetting-study-"))
    try:
        watched = [row for item in data.sets for row in (*item.rows, *item.placebo)]
        recorder = DeltaRecorder(folder / "store", keep=1.0, watch=watched)
        original, seconds = train(data, optimizer, seed, recorder)
        everything = {row for item in data.sets for row in item.rows}
        independent, _ = train(data, optimizer, seed + 1000, LeaveOut(everything))
        rows: list[dict[str, Any]] = []
        for item in data.sets:
            twin, twin_seconds = train(data, optimizer, seed, LeaveOut(item.rows))
            rows += forget_set_rows(folder / "store", data, item, original, twin, independent, seed)
            for row in rows[-2 - len(METHODS) - len(PLACEBOS) :]:
                row |= {"optimizer": optimizer, "seed": seed, "train_seconds": seconds, "twin_seconds": twin_seconds}
        return rows
    finally:
        shutil.rmtree(folder)


def forget_set_rows(
    store: Path, data: FashionData, item: ForgetSet, original: Any, twin: Any, independent: Any, seed: int
) -> list[dict[str, Any]]:
    """Forget one set in every way and measure each model against its twin."""
    models = {"original": original, "independent retraining": independent}
    plans: dict[str, dict[str, Any]] = {}
    runs = [(label, *METHODS[label], item.rows, None) for label in METHODS]
    # The placebo's repair leaves out the real set as well, or it would teach it again.
    runs += [(f"placebo: {label}", *METHODS[label], item.placebo, list(item.rows)) for label in PLACEBOS]
    for label, method, then, rows, control_for in runs:
        result = unlearn(
            original, list(rows), method=method, data=data.train_dataloader(), store=store, then=then, seed=seed,
            force=True, probe_samples=0, record=False, control_for=control_for,
        )  # fmt: skip
        models[label] = result.model
        plan = result.plan
        plans[label] = {"unlearning_seconds": result.seconds}
        if plan is not None and not label.endswith("only"):
            plans[label] |= {
                "touched_fraction": plan.touched_fraction, "relative_norm": plan.relative_norm,
                "mean_share": plan.mean_share, "damage": plan.damage, "specificity": plan.specificity,
            }  # fmt: skip
    truth = data.true_labels[list(item.rows)]
    measured = compare_models(
        {**models, "twin": twin}, data.evaluation(item.rows), reference="twin", true_targets=truth
    )
    common = {"set": item.name, "size": item.size, "grouped": item.grouped, "mislabelled": item.mislabelled}
    twin_values = {f"twin_{name}": value for name, value in measured["twin"].items()}
    start = {f"original_{name}": value for name, value in measured["original"].items()}
    shared = {**common, **twin_values, **start}
    return [{**shared, "model": label, **measured[label], **plans.get(label, {})} for label in models]


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """The rows as JSON, numbers to six significant digits."""

    def short(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    kept = [{key: short(value) for key, value in row.items()} for row in rows]
    settings = {"epochs": EPOCHS, "batch": BATCH, "train": TRAIN, "test": TEST}
    sets = [asdict(item) for item in forget_sets()]
    path.write_text(json.dumps({"settings": settings, "sets": sets, "rows": kept}))


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder that holds FashionMNIST/raw")
    parser.add_argument("--output", type=Path, default=Path("forgetting-study"), help="stem of the files written")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"], choices=["sgd", "adamw"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--download", action="store_true", help="fetch the data into --data-root")
    options = parser.parse_args()
    console = Console()
    stored = options.output.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(stored.read_text())["rows"] if stored.exists() else []
    done = {(row["optimizer"], row["seed"]) for row in rows}
    jobs = [(name, seed) for seed in range(options.seeds) for name in options.optimizers if (name, seed) not in done]
    context = get_context("spawn")
    with Progress(console=console) as progress, ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        task = progress.add_task("trainings with all their requests", total=len(jobs))
        futures = [pool.submit(run, options.data_root, options.download, *job) for job in jobs]
        for future in as_completed(futures):
            rows += future.result()
            rows.sort(key=lambda row: (row["optimizer"] != "sgd", row["seed"]))
            write_rows(rows, stored)
            progress.advance(task)
    write_rows(rows, stored)
    tables = options.output.with_name(options.output.name + "-tables.md")
    write_tables(rows, tables, {"epochs": EPOCHS, "batch": BATCH, "train": TRAIN, "test": TEST})
    console.print(f"Wrote {stored} and {tables}.")


if __name__ == "__main__":
    main()
