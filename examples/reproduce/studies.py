"""What the studies of papers share: jobs that are kept as they end, tables with spread, a page below a marker.

A study is stages of jobs. A job has a `key` and is the smallest thing that an interrupted study does again; its result
is a mapping that JSON can hold. Jobs of one stage do not wait for each other, stages do.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from lightning_unlearn.procedures.worker_pool import worker_pool

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from reporting import machine
from tables import machine_line

__all__ = [
    "Document",
    "Job",
    "Row",
    "finite",
    "head_line",
    "options_for",
    "quiet",
    "run_stages",
    "save_document",
    "save_figure",
    "spread",
    "table",
    "write_page",
]

Row = dict[str, Any]
Document = dict[str, Any]


class Job(Protocol):
    """One unit of work."""

    @property
    def key(self) -> str:
        """Its name in the JSON, the same in every run."""
        ...


def quiet() -> None:
    """One thread, and none of the messages that every Trainer repeats; called by each job."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in (".*does not have many workers.*", ".*treespec.*"):
        warnings.filterwarnings("ignore", message=message)


def finite(row: Mapping[str, Any]) -> Row:
    """Five significant digits; what is not finite, as after a training that diverged, is None."""

    def short(value: Any) -> Any:
        if isinstance(value, Mapping):
            return finite(value)
        if isinstance(value, list):
            return [short(one) for one in value]
        if not isinstance(value, float):
            return value
        return float(f"{value:.5g}") if math.isfinite(value) else None

    return {name: short(value) for name, value in row.items()}


def opened(path: Path, preset: str, settings: Mapping[str, Any]) -> Document:
    """What is in the JSON already.

    Raises:
        SystemExit: it is of another preset, or of the same with other settings.
    """
    plain = json.loads(json.dumps(settings))
    if not path.exists():
        return {"preset": preset, "settings": plain, "machine": machine(), "jobs": {}}
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    if (document["preset"], document["settings"]) != (preset, plain):
        raise SystemExit(f"Expected {path} to be of the preset {preset!r} as it is now. Name another --output.")
    return document


def save_document(document: Document, path: Path) -> None:
    """Replace the JSON, wholly or not at all; one line for each job."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dumps = partial(json.dumps, allow_nan=False, separators=(",", ":"))
    jobs = ",\n".join(f"{dumps(key)}:{dumps(job)}" for key, job in document["jobs"].items())
    head = dumps({key: value for key, value in document.items() if key != "jobs"})
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(f'{head[:-1]},"jobs":{{\n{jobs}\n}}}}\n', encoding="utf-8")
    os.replace(draft, path)


def _finished(jobs: Sequence[Job], workers: int, run: Callable[[Any], Document]) -> Iterator[tuple[Job, Document]]:
    """Jobs with their results, as they end; in this process for one worker."""
    if workers == 1:
        yield from ((job, run(job)) for job in jobs)
        return
    with worker_pool(None, workers) as pool:
        futures = {pool.submit(run, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def run_stages(
    path: Path,
    preset: str,
    settings: Mapping[str, Any],
    stages: Iterable[Sequence[Job]],
    run: Callable[[Any], Document],
    *,
    workers: int = 2,
) -> tuple[Document, int]:
    """Run the jobs that are not in the JSON yet, stage by stage, and put each there as it ends.

    Args:
        path: The JSON.
        preset: Name of the preset.
        settings: What the preset says; a JSON of other settings is not gone on with.
        stages: Jobs; in a stage the long ones first.
        run: Job -> its result; for several workers it has to pickle.
        workers: Processes; with one, jobs run in this process.

    Returns:
        The document, and how many jobs were run.
    """
    document = opened(path, preset, settings)
    count = 0
    for stage in stages:
        missing = [job for job in stage if job.key not in document["jobs"]]
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task(f"{preset}: {len(missing)} jobs", total=len(missing))
            for job, result in _finished(missing, workers, run):
                document["jobs"][job.key] = result
                save_document(document, path)
                progress.advance(bar)
                count += 1
    return document, count


def head_line(document: Document, seeds: str, keys: Iterable[str]) -> str:
    """The sentence that a page begins with: preset, seeds, how long the jobs took, and on what machine.

    Args:
        document: What `run_stages` returned; every job has `seconds`.
        seeds: How many, such as `"3 seeds"`.
        keys: Of the jobs that belong to the preset.
    """
    times = [document["jobs"][key]["seconds"] for key in keys]
    return (
        f"Preset `{document['preset']}`, {seeds}; mean ± standard deviation over seeds. {len(times)} jobs, one thread "
        f"each, took {sum(times) / 60:.1f} minutes together. {machine_line(document['machine'])}"
    )


def spread(values: Iterable[float | None], digits: int = 3, scale: float = 1.0) -> str:
    """Mean and standard deviation over seeds, to so many significant digits; a dash for none."""
    numbers = [value * scale for value in values if value is not None]
    if not numbers:
        return "-"
    mean = float(f"{statistics.fmean(numbers):.{digits}g}")  # 3010, where .3g alone would write 3.01e+03
    behind = f" ± {float(f'{statistics.stdev(numbers):.2g}'):g}" if len(numbers) > 1 else ""
    return f"{mean:g}{behind}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def marker_of(script: str) -> str:
    """The line below which a script writes."""
    return f"<!-- Below this line: written by examples/reproduce/{script} -->"


def write_page(page: Path, script: str, title: str, parts: Sequence[str]) -> None:
    """Write everything below the marker anew; a page that is not there yet gets a heading and the marker."""
    marker = marker_of(script)
    before, found, _ = page.read_text(encoding="utf-8").partition(marker) if page.exists() else ("", "", "")
    start = before + marker if found else f"{before.rstrip() or f'# {title}'}\n\n{marker}"
    page.write_text("\n\n".join([start, *parts]) + "\n", encoding="utf-8")


def save_figure(figure: Figure, stem: Path, name: str) -> Path:
    """Write `STEM-NAME.png` without a date, so that the same figure is the same file."""
    path = stem.with_name(f"{stem.name}-{name}.png")
    figure.savefig(path, dpi=80, metadata={"Software": None})
    return path


def options_for(description: str, name: str, presets: Iterable[str]) -> argparse.ArgumentParser:
    """The arguments that every study has.

    Args:
        description: Of the script.
        name: Of the study; its files are called so.
        presets: Names of the presets, `"cpu"` among them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(presets), default="cpu")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(name), help="stem of the files written")
    parser.add_argument("--workers", type=int, default=2, help="processes; 1 runs jobs in this one")
    parser.add_argument("--download", action="store_true", help="fetch torchvision's data sets into --data-root")
    return parser
