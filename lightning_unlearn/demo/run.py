"""Run all arms of the demo in parallel, show progress, and write the report."""

from __future__ import annotations

import logging
import queue
import shutil
import sys
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lightning_unlearn.demo.arm import ARMS, CONTRIBUTORS, PLACEBOS, VARIANTS, ArmResult, Placement, run_arm
from lightning_unlearn.demo.document import build_report
from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.utilities.checks import check_positive_int, expected

__all__ = ["run_demo"]

_MARKER = "lightning-unlearn demo"
_PIECES = 1 + len(CONTRIBUTORS) * (len(VARIANTS) + len(PLACEBOS) + 2)


def run_demo(output: Path, *, seeds: int = 3, workers: int = 2, console: Console | None = None) -> list[ArmResult]:
    """Run the demo: `output/report.html`, `output/report.json`, the stores of the arms, and tables on the console.

    Args:
        output: Folder; an earlier demo's folder is replaced, any other that is not empty is refused.
        seeds: Repetitions of each arm.
        workers: Processes.
        console: Where to print.

    Returns:
        The arms.

    Raises:
        StoreMismatchError: `output` holds something else.
        ValueError: `seeds` or `workers` is not positive.
    """
    console = console or Console()
    check_positive_int("seeds", seeds)
    check_positive_int("workers", workers)
    _prepare(output)
    started = time.perf_counter()
    arms = [(seed, placement) for seed in range(seeds) for placement in ARMS]
    results = _run(arms, output / "stores", min(workers, len(arms)), console)
    report = build_report(results, time.perf_counter() - started)
    report.print(console)
    page = report.to_html(output / "report.html")
    numbers = report.to_json(output / "report.json", data={"arms": results})
    console.print(f"Wrote {page} and {numbers} in {time.perf_counter() - started:.0f} s.", highlight=False)
    return results


def _prepare(output: Path) -> None:
    marker = output / ".demo"
    if output.exists() and any(output.iterdir()):
        if not marker.exists() or marker.read_text().strip() != _MARKER:
            raise StoreMismatchError(
                expected("output", "an empty folder or an earlier demo's", str(output), "Choose another with --output.")
            )
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text(_MARKER + "\n")


def _run(arms: list[tuple[int, Placement]], folder: Path, workers: int, console: Console) -> list[ArmResult]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # A forked worker has everything imported; it is forked before this process starts a thread or computes anything.
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    messages = context.Queue()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(messages,)) as pool:
        futures = [pool.submit(_arm, seed, placement, folder) for seed, placement in arms]
        with Progress(*columns, console=console) as progress:
            tasks = {arm: progress.add_task(f"seed {arm[0]}, {arm[1]}: waiting", total=_PIECES) for arm in arms}
            try:
                _follow(futures, messages, progress, tasks)
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _follow(
    futures: list[Future[ArmResult]], messages: Any, progress: Progress, tasks: dict[tuple[int, Placement], Any]
) -> None:
    """Show messages until every arm is done or one has failed."""
    running = True
    while running:
        done, pending = wait(futures, timeout=0.1)
        running = bool(pending) and not any(future.exception() for future in done)
        while True:
            try:
                seed, placement, text = messages.get_nowait()
            except queue.Empty:
                break
            task = tasks[seed, placement]
            progress.update(task, description=f"seed {seed}, {placement}: {text or 'done'}")
            if text:
                progress.advance(task)
            else:
                progress.update(task, completed=_PIECES)


_worker: dict[str, Any] = {}
"""What a worker process was begun with."""


def _begin(messages: Any) -> None:
    _worker["messages"] = messages
    _quiet()


def _quiet() -> None:
    """A worker computes on one thread, so that two of them share two cores, and leaves talking to the demo."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _arm(seed: int, placement: Placement, folder: Path) -> ArmResult:
    def say(text: str) -> None:
        _worker["messages"].put((seed, placement, text))

    result = run_arm(seed, placement, folder, say)
    say("")
    return result
