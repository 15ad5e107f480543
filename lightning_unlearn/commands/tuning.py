"""`lightning-unlearn tune`."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_unlearn.commands.inputs import checked_trainer, read_ids, read_methods, read_repair
from lightning_unlearn.results import to_dict
from lightning_unlearn.tuning.journal import TrialJournal
from lightning_unlearn.tuning.objective import Goal, Objective, Utility
from lightning_unlearn.tuning.plots import plot_pareto
from lightning_unlearn.tuning.result import TrialRecord, TuningResult
from lightning_unlearn.tuning.trials import Sampler, trials_ended
from lightning_unlearn.tuning.tune import tune
from lightning_unlearn.utilities.checkpoints import load_weights
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.files import Files

__all__ = ["tune_command"]

_JOURNAL, _WINNER, _TRIALS, _PICTURE = "trials.journal", "tuned.yaml", "trials.json", "pareto.png"


def tune_command(
    model: LightningModule,
    data: LightningDataModule,
    checkpoint: str,
    forget: list[str | int] | str,
    methods: list[str] | str,
    goal: Goal,
    lambda_: float = 0.5,
    utility: Utility = "absolute",
    trials: int = 40,
    storage: Path | None = None,
    workers: int = 1,
    sampler: Sampler = "tpe",
    seed: int = 0,
    repeats: int = 1,
    store: str | None = None,
    then: str | None = None,
    trainer: dict[str, Any] | None = None,
    sample_keys: Callable[[int], int | str] | None = None,
    adapter: Callable[[Any, Any], Any] | None = None,
    output: Path = Path("tuned"),
) -> None:
    """Choose a method's settings, or a method, on validation data; the same command again goes on where it ended.

    Args:
        model: The trained module, as class_path and init_args.
        data: Its datamodule, as class_path and init_args; with validation data.
        checkpoint: Its weights: path or URL of a Lightning checkpoint, or a folder of shards.
        forget: Ids to forget: a list, or a file with one id a line or a JSON list.
        methods: Methods to tune, each by name or as a YAML file.
        goal: What forgetting is for.
        lambda_: Weight of the goal, from 0 (utility alone) to 1 (goal alone).
        utility: Whether the validation error counts as it is, or relative to the original model's.
        trials: How many settings are tried, defaults and earlier trials included.
        storage: Journal of the trials, on a local or shared disk; by default trials.journal in the output folder.
        workers: Processes of this command.
        sampler: How settings are drawn.
        seed: Of the draws and the passes.
        repeats: Passes a trial, whose errors are averaged.
        store: What DeltaRecorder recorded, path or URL, for methods that need it.
        then: Repair after every pass: a method that trains, by name or as a YAML file.
        trainer: Arguments of lightning.Trainer.
        sample_keys: Dotted path of a function from positions to keys, as given to the recorder.
        adapter: Dotted path of a function from module and batch to logits and targets, where batches are not (x, y).
        output: Folder for tuned.yaml, trials.json and pareto.png, which are replaced.
    """
    objective = Objective(goal, lambda_, utility)
    ids, named, repair = read_ids(forget), read_methods(methods), read_repair(then)
    load_weights(model, checkpoint)
    if output.exists() and not output.is_dir():
        raise ValueError(expected("output", "a folder", str(output)))
    output.mkdir(parents=True, exist_ok=True)
    console, journal = Console(), TrialJournal(storage or output / _JOURNAL)
    with _progress(console, journal, trials, poll=workers > 1) as on_trial:
        result = tune(
            model,
            ids,
            methods=named,
            data=data,
            objective=objective,
            trials=trials,
            storage=journal.path,
            workers=workers,
            sampler=sampler,
            store=store,
            then=repair,
            trainer=checked_trainer(trainer),
            seed=seed,
            repeats=repeats,
            sample_keys=sample_keys,
            adapter=adapter,
            on_trial=on_trial,
        )
    _write(result, output)
    _print(result, output, console)


def _write(result: TuningResult, output: Path) -> None:
    """Write every trial, and then the winner and the picture.

    Raises:
        LightningUnlearnError: no trial came to its end; the trials are written then, and nothing else.
    """
    files = Files(output)
    files.publish(_TRIALS, json.dumps(_plain(result), indent=1, allow_nan=False).encode())
    result.save(output / _WINNER)
    picture = io.BytesIO()
    plot_pareto(result).savefig(picture, format="png", dpi=150)
    files.publish(_PICTURE, picture.getvalue())


def _plain(result: TuningResult) -> dict[str, Any]:
    """A study in plain data; it holds no ids."""
    ended = any(trial.rates is not None for trial in result.trials)
    trials = [
        {
            "number": trial.number,
            "label": trial.label,
            "method": trial.base.name,
            "settings": trial.settings,
            "status": trial.status,
            "is_default": trial.is_default,
            "rates": trial.rates,
            "goal_error": trial.goal_error,
            "value": trial.value,
            "seconds": trial.seconds,
            "notes": trial.notes,
        }
        for trial in result.trials
    ]
    best = result.best.number if ended else None
    content = {"objective": asdict(result.objective), "best": best, "notes": result.notes, "trials": trials}
    return dict(to_dict(content))


@contextmanager
def _progress(console: Console, journal: TrialJournal, trials: int, *, poll: bool) -> Iterator[Callable[[], None]]:
    """Show how many trials have ended, whoever ended them; what is yielded is called after a trial of this process."""
    columns = (SpinnerColumn(), TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("trials", total=trials)

        def show() -> None:
            ended = trials_ended(journal)
            progress.update(task, completed=ended, total=max(trials, ended))

        over = threading.Event()

        def watch() -> None:
            while not over.wait(1.0):
                show()

        show()
        watching = threading.Thread(target=watch, daemon=True)
        if poll:
            watching.start()
        try:
            yield show
        finally:
            over.set()
            if poll:
                watching.join()
        show()


def _print(result: TuningResult, output: Path, console: Console) -> None:
    table = Table(title="On validation data", title_justify="left")
    table.add_column("trial", no_wrap=True)
    table.add_column("settings", overflow="fold")
    for column in ("goal error", "validation error", "value"):
        table.add_column(column, justify="right")
    best = result.best
    rows = [(f"{best.label}, chosen", best)]
    rows += [(f"{trial.label}, defaults", trial) for trial in result.trials if trial.is_default]
    for label, trial in rows:
        settings = ", ".join(f"{name}={_short(value)}" for name, value in trial.settings.items())
        table.add_row(label, settings, *_numbers(trial))
    console.print(table)
    for note in result.notes:
        console.print(note, highlight=False, markup=False)
    text = (
        f"These are errors on validation data and on the samples to forget, the best of {len(result.trials)} trials: "
        "report what the chosen settings do on test data, which nobody has looked at."
    )
    console.print(text, highlight=False, markup=False)
    text = f"{output / _WINNER} is what `lightning-unlearn unlearn --method` takes."
    console.print(text, highlight=False, markup=False)


def _numbers(trial: TrialRecord) -> list[str]:
    if trial.rates is None or trial.goal_error is None or trial.value is None:
        return [trial.status, "", ""]
    return [f"{number:.4f}" for number in (trial.goal_error, trial.rates.validation, trial.value)]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
