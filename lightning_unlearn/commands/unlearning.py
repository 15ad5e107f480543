"""`lightning-unlearn unlearn`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule
from rich.console import Console
from rich.table import Table

from lightning_unlearn.api import unlearn
from lightning_unlearn.commands.inputs import checked_trainer, read_ids, read_method, read_repair
from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.procedures.outcome import UnlearningResult
from lightning_unlearn.utilities.checkpoints import load_weights
from lightning_unlearn.utilities.checks import expected

__all__ = ["unlearn_command"]


def unlearn_command(
    model: LightningModule,
    data: LightningDataModule,
    checkpoint: str,
    forget: list[str | int] | str,
    method: str,
    output: Path,
    then: str | None = None,
    store: str | None = None,
    trainer: dict[str, Any] | None = None,
    seed: int | None = None,
    sample_keys: Callable[[int], int | str] | None = None,
    sample_id: str | None = None,
    adapter: Callable[[Any, Any], Any] | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> None:
    """Forget samples, and write the model as an ordinary checkpoint; the exit status is 1 where it was rolled back.

    Args:
        model: The trained module, as class_path and init_args.
        data: Its datamodule, as class_path and init_args.
        checkpoint: Its weights: path or URL of a Lightning checkpoint, or a folder of shards.
        forget: Ids to forget: a list, or a file with one id a line or a JSON list.
        method: A method by name or as a YAML file, such as the tuned.yaml of tune.
        output: The checkpoint to write.
        then: Repair after the pass: a method that trains, by name or as a YAML file.
        store: What DeltaRecorder recorded, path or URL; its ledger is written.
        trainer: Arguments of lightning.Trainer.
        seed: Seeds every stage that draws.
        sample_keys: Dotted path of a function from positions to keys, as given to the recorder.
        sample_id: Key of the batch that holds its ids, as given to the recorder.
        adapter: Dotted path of a function from module and batch to logits and targets, where batches are not (x, y).
        force: Carry out a plan that refuses, and keep a model the probe calls collapsed.
        overwrite: Replace the output where it exists.
    """
    if output.is_dir() or (output.exists() and not overwrite):
        remedy = "It is a folder." if output.is_dir() else "Name another, or add --overwrite."
        raise ValueError(expected("output", "a file that does not exist yet", str(output), remedy))
    ids = read_ids(forget)
    load_weights(model, checkpoint)
    chosen, repair = read_method(method), read_repair(then)
    output.parent.mkdir(parents=True, exist_ok=True)  # before the ledger says that something was removed
    result = unlearn(
        model,
        ids,
        method=chosen,
        data=data,
        store=store,
        trainer=checked_trainer(trainer),
        then=repair,
        seed=seed,
        sample_keys=sample_keys,
        sample_id=sample_id,
        adapter=adapter,
        force=force,
    )
    _print(result, Console())
    if result.rolled_back:
        rule, remedy = "unharmed by the pass", "Nothing was written; choose other settings, or add --force."
        raise LightningUnlearnError(expected("model", rule, "one that the probe calls collapsed", remedy))
    result.save(output)
    Console().print(f"{output} holds the forgotten model.", highlight=False, markup=False)


def _print(result: UnlearningResult, console: Console) -> None:
    title = f"Forgetting with {result.method} in {result.seconds:.1f} s"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "seconds", "steps", "change of weights", "probe before", "probe after"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in result.stages:
        change = "" if stage.relative_change is None else f"{stage.relative_change:.2g}"
        probes = (_told(stage.probe_before), _told(stage.probe_after))
        table.add_row(stage.name, f"{stage.seconds:.1f}", str(stage.steps), change, *probes)
    console.print(table)
    for heading, lines in (("Notes", result.notes), ("Still holding the samples", result.leftovers)):
        if lines:
            console.print(f"{heading}:", highlight=False, markup=False)
        for line in lines:
            console.print(f"- {line}", highlight=False, markup=False)


def _told(probe: Mapping[str, float]) -> str:
    return "\n".join(f"{name} {value:.3g}" for name, value in probe.items())
