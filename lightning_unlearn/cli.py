"""The command line: `lightning-unlearn plan-recording`, `tune`, `unlearn`, `demo`, `methods`, `store info` and more."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, auto_cli
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_unlearn.commands import plan_recording_command, tune_command, unlearn_command
from lightning_unlearn.demo.run import run_demo
from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.methods.catalogue import catalogue, catalogue_page
from lightning_unlearn.results import to_dict
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.documents import FORMAT_VERSION
from lightning_unlearn.store.joining import join_parts

__all__ = ["main"]

_SWITCHES = ("--json", "--markdown", "--repair", "--force", "--overwrite", "--sharded", "--measure")


class _Parser(ArgumentParser):
    """The parser of jsonargparse, with options alone for the commands that people give a configuration file."""

    def add_function_arguments(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if function in (tune_command, unlearn_command):
            kwargs["as_positional"] = False
        return super().add_function_arguments(function, *args, **kwargs)


def store_info(store: str, json: bool = False) -> None:
    """Say what a store holds: steps, deltas, size, errors, identity of the samples, runs, model states, requests.

    Args:
        store: Path or URL.
        json: Print JSON instead of a table.
    """
    if json:
        print(dumps(to_dict(DeltaStore.open(store).info()), indent=1))
        return
    table = Table(title=f"Store {store}", show_header=False, title_justify="left")
    for label, value in DeltaStore.open(store).info().rows():
        table.add_row(label, value)
    Console().print(table)


def store_verify(store: str, repair: bool = False) -> None:
    """Check every file and every step of a store; the exit status is 1 where something is damaged, and stays so.

    Args:
        store: Path or URL.
        repair: Drop the damaged steps, and only those, so that the store can be read again.
    """
    opened = DeltaStore.open(store, check=False)
    report = opened.repair() if repair else opened.verify()
    Console().print(str(report), highlight=False, markup=False)
    if any(not (repair and damage.repairable) for damage in report.damages):
        raise SystemExit(1)


def store_compact(store: str) -> None:
    """Merge neighbouring small segments of a store, such as what many checkpoints or a purge have left.

    Args:
        store: Path or URL.
    """
    merged = DeltaStore.open(store).compact()
    Console().print(f"{merged} segments became part of larger ones", highlight=False, markup=False)


def store_upgrade(store: str) -> None:
    """Rewrite a store of an older format version in the current one; older releases cannot open it afterwards.

    Args:
        store: Path or URL.
    """
    rewritten = DeltaStore.open(store).upgrade()
    Console().print(f"format version {FORMAT_VERSION}; {rewritten} segments rewritten", highlight=False, markup=False)


def store_join(url: str, parts: list[str]) -> None:
    """Copy what ranks recorded on other nodes into a store; finishes what was interrupted, and copies nothing twice.

    Args:
        url: What rank 0 recorded into; or a new place, if that is among the parts.
        parts: Paths or URLs of what the other nodes recorded into.
    """
    Console().print(str(join_parts(url, parts)), highlight=False, markup=False)


def demo(output: Path = Path("unlearn_demo"), seeds: int = 3, workers: int = 2) -> None:
    """Train, record, ask, forget and prove on scikit-learn's digits; writes report.json and report.html.

    Args:
        output: Folder for the report and the stores.
        seeds: Independent repetitions, for the spread.
        workers: Processes.
    """
    run_demo(output, seeds=seeds, workers=workers, console=Console())


def methods(markdown: bool = False) -> None:
    """List the unlearning methods with their guarantee, cost and what they need.

    Args:
        markdown: Print the documentation page instead, with every method's card.
    """
    if markdown:
        print(catalogue_page(), end="")
        return
    table = Table(title="Unlearning methods", title_justify="left")
    for column in ("method", "guarantee", "cost", "needs", "source"):
        table.add_column(column, no_wrap=column == "method")
    for row in catalogue():
        table.add_row(row.name, row.guarantee, row.cost, row.needs, row.source)
    Console().print(table)


def _with_values(arguments: Sequence[str]) -> list[str]:
    """The parser wants `--json true` and `--batch_size`; `--json` alone and `--batch-size` are understood as well."""
    arguments = [_with_underscores(one) for one in arguments]
    following = [*arguments[1:], ""]
    return [
        f"{one}=true" if one in _SWITCHES and after.lower() not in ("true", "false") else one
        for one, after in zip(arguments, following, strict=True)
    ]


def _with_lists(arguments: Sequence[str]) -> list[str]:
    """The parser wants `store join URL '["PART", "PART"]'`; `store join URL PART PART` is understood as well."""
    head, parts = list(arguments[:3]), list(arguments[3:])
    if head[:2] != ["store", "join"] or not parts or parts[0].startswith(("-", "[")):
        return list(arguments)
    return [*head, dumps(parts)]


def _with_underscores(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def _is_sentence(error: Exception) -> bool:
    """Whether an error was raised by a check of this package, and not by the user's code or by a mistake."""
    return isinstance(error, LightningUnlearnError) or str(error).startswith("Expected `")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `lightning-unlearn`; errors of this package end it with one sentence and status 1."""
    # Lightning announces devices and tips on every Trainer; a command's output is its own.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if arguments is None and os.getcwd() not in sys.path:
        # An installed script does not see the modules beside which it is called; last, so that they hide no other.
        sys.path.append(os.getcwd())
    commands: Any = {
        "plan-recording": plan_recording_command,
        "tune": tune_command,
        "unlearn": unlearn_command,
        "demo": demo,
        "methods": methods,
        "store": {
            "info": store_info,
            "verify": store_verify,
            "compact": store_compact,
            "upgrade": store_upgrade,
            "join": store_join,
        },
    }
    given = _with_lists(_with_values(sys.argv[1:] if arguments is None else arguments))
    try:
        auto_cli(commands, args=given, as_positional=True, parser_class=_Parser)
    except (LightningUnlearnError, ValueError, TypeError, FileNotFoundError) as error:
        if not _is_sentence(error):
            raise
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False)
        sys.exit(1)
