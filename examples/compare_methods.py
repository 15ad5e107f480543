r"""Every applicable method side by side, with the package's defaults, next to retraining.

    uv run python examples/compare_methods.py --dataset digits --scenario random
    uv run python examples/compare_methods.py --dataset fashion-mnist --scenario class --data-root DATA

For each seed a network is trained and recorded, retrained without the samples (a twin: same start, same batches), and
unlearned by every method; those that subtract recorded deltas a second time with the repair that their plans ask for.
The row `another seed` is a retraining from another start: what differs by no more than that is noise. `--json` and
`--markdown` write the figures. `--stop retain` pushes on where held-out data say nothing about the forgotten samples,
as with a trigger.

A LightningModule and a LightningDataModule of your own are compared in the same way; they are imported, not changed:

    uv run python examples/compare_methods.py --module mine.py:MyModule --datamodule mine.py:MyData --forget 3,17,40 \
        --max-epochs 10
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare_data import SCENARIOS, Data, make_task, network_for
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_unlearn import DeltaRecorder, UnlearningDataModule, unlearn
from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.methods import (
    METHODS,
    FineTune,
    LossMethod,
    Procedure,
    Requirement,
    Retrain,
    UnlearningMethod,
)
from lightning_unlearn.procedures.compare import compare_models
from lightning_unlearn.procedures.planning import subtracts

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
COLUMNS = (
    "forget_accuracy",
    "retain_accuracy",
    "test_accuracy",
    "true_label_accuracy",
    "membership_auroc",
    "forget_kl",
    "test_kl",
    "verification_error",
    "seconds",
    "speedup",
)
Row = dict[str, float | str]
AVAILABLE = frozenset(
    {
        Requirement.DELTAS,
        Requirement.DENSE_DELTAS,
        Requirement.FORGET_DATA,
        Requirement.RETAIN_DATA,
        Requirement.VALIDATION_DATA,
        Requirement.INITIAL_WEIGHTS,
    }
)
"""What there is here; a user's checkpoints, or an ensemble, are not."""


def from_file(where: str) -> Any:
    """What is named in `path/to/file.py:Name`."""
    path, _, name = where.partition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None or not name:
        raise SystemExit(f"expected `file.py:Name`, got {where!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pickling and dataclasses look there
    spec.loader.exec_module(module)
    return getattr(module, name)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the seconds it took."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def one_seed(
    seed: int,
    make_module: Callable[[], LightningModule],
    make_data: Callable[[], LightningDataModule],
    forget: list[Any],
    epochs: int,
    names: list[str],
    true_targets: Tensor | None,
    accelerator: str,
    stop: str | None = None,
) -> dict[str, Row]:
    """Train, retrain, unlearn by every method, and compare; label -> figures, or why there are none."""
    trainer = {"max_epochs": epochs, "accelerator": accelerator, "devices": 1, **QUIET}
    with tempfile.TemporaryDirectory() as folder:
        seed_everything(seed, verbose=False)
        original, store = make_module(), f"{folder}/store"
        recorder = DeltaRecorder(store, keep=1.0, value_dtype="float32")
        Trainer(**trainer, callbacks=[recorder]).fit(original, datamodule=make_data())

        def run(method: UnlearningMethod, then: LossMethod | None = None) -> LightningModule:
            arguments = trainer if isinstance(method, Procedure) else {**trainer, "max_epochs": None}
            given = {name: value for name, value in arguments.items() if value is not None}
            return unlearn(
                original,
                forget,
                method=method,
                data=make_data(),
                store=store,
                trainer=given,
                then=then,
                seed=seed,
                record=False,
                probe_samples=0,
                force=True,  # what a method does to the model is to be seen here, not prevented
            ).model

        twin, retraining = timed(lambda: run(Retrain(order="recorded")))
        seed_everything(1000 + seed, verbose=False)
        other = make_module()
        split = UnlearningDataModule(make_data(), forget)
        Trainer(**trainer).fit(other, datamodule=split.retain_only())
        models: dict[str, LightningModule] = {"original": original, "retrained": twin, "another seed": other}
        seconds, failed = {"retrained": retraining}, dict[str, Row]()
        for label, method, then in passes(names, stop):
            try:
                models[label], seconds[label] = timed(partial(run, method, then))
            except (LightningUnlearnError, ValueError) as error:
                reason = "forgets whole classes only" if method.forgets == "classes" else str(error)
                failed[label] = {"failed": reason}
    split = UnlearningDataModule(make_data(), forget)
    data = {"forget": split.forget_loader(), "retain": split.retain_loader(), "test": split.test_loader()}
    rows: dict[str, Row] = dict(compare_models(models, data, reference="retrained", true_targets=true_targets))
    for name, spent in seconds.items():
        rows[name] |= {"seconds": spent, "speedup": retraining / spent}
    same = {name for name, model in models.items() if name != "original" and is_same(model, original)}
    for name in same:
        rows[name]["failed"] = "changed nothing"
    return rows | failed


def passes(names: list[str], stop: str | None) -> Iterator[tuple[str, UnlearningMethod, LossMethod | None]]:
    """Label, method and repair of everything that is run."""
    for name in names:
        known = METHODS[name]
        settings = {"stop": stop} if stop is not None and "stop" in inspect.signature(known).parameters else {}
        method = known(**settings)
        if method.missing(AVAILABLE) or isinstance(method, Retrain):
            continue
        yield name, method, None
        if subtracts(method):
            yield f"{name}, repaired", method, FineTune()


def is_same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two models have the same weights, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def merged(runs: list[Mapping[str, Row]]) -> dict[str, dict[str, Any]]:
    """Mean and range over the seeds of every figure."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        rows = [run[name] for run in runs if name in run]
        found[name] = {}
        for column in COLUMNS:
            values = [row[column] for row in rows if isinstance(row.get(column), float)]
            if values:
                found[name][column] = [statistics.fmean(values), min(values), max(values)]
        reasons = sorted({str(row["failed"]) for row in rows if "failed" in row})
        if reasons:
            found[name]["failed"] = reasons
    return found


def lines(rows: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table: means, with half the range behind them."""
    columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
    cells = []
    for name, row in rows.items():
        texts = []
        for column in columns:
            if column not in row:
                texts.append("")
                continue
            mean, low, high = row[column]
            texts.append(f"{mean:.3g}" + (f" ±{(high - low) / 2:.2g}" if high > low else ""))
        cells.append([name, *texts, "; ".join(row.get("failed", []))])
    return ["model", *(column.replace("_", " ") for column in columns), "note"], cells


def main() -> None:
    """Read the arguments, run all seeds, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist", "cifar10"], default="digits")
    parser.add_argument("--scenario", choices=SCENARIOS, default="random")
    parser.add_argument("--data-root", help="folder that holds FashionMNIST/raw or cifar-10-batches-py")
    parser.add_argument("--methods", help="names, separated by commas; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stop", choices=["held_out", "retain"], help="for methods that push; theirs by default")
    parser.add_argument("--module", help="file.py:Name of a LightningModule that needs no arguments")
    parser.add_argument("--datamodule", help="file.py:Name of a LightningDataModule that needs no arguments")
    parser.add_argument("--forget", help="positions in the training data, separated by commas, for --module")
    parser.add_argument("--max-epochs", type=int, help="length of the training")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # what is warned of is in the table
    names = arguments.methods.split(",") if arguments.methods else sorted(METHODS)
    runs = []
    for seed in range(arguments.seeds):
        if arguments.module:
            if not (arguments.datamodule and arguments.forget and arguments.max_epochs):
                parser.error("--module needs --datamodule, --forget and --max-epochs")
            make_module, make_data = from_file(arguments.module), from_file(arguments.datamodule)
            forget, epochs, true = [int(one) for one in arguments.forget.split(",")], arguments.max_epochs, None
        else:
            task = make_task(arguments.dataset, arguments.scenario, seed, arguments.data_root)
            make_module, make_data = network_for(task), lambda task=task: Data(task)
            forget, epochs, true = task.forget, arguments.max_epochs or task.epochs, task.true_targets
        shared = names, true, arguments.accelerator, arguments.stop
        runs.append(one_seed(seed, make_module, make_data, forget, epochs, *shared))
    rows = merged(runs)
    title = arguments.module or f"{arguments.dataset}, {arguments.scenario}"
    title += f", {arguments.seeds} seeds" + (f", stop={arguments.stop!r}" if arguments.stop else "")
    header, cells = lines(rows)
    table = Table(*header, title=title)
    for row in cells:
        table.add_row(*row)
    Console(width=200).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1))
    if arguments.markdown:
        text = [f"## {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        arguments.markdown.write_text("\n".join([*text, *("| " + " | ".join(row) + " |" for row in cells), ""]))


if __name__ == "__main__":
    main()
