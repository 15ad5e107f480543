"""The measurements of "Unrolling SGD" (Thudi, Deza, Chandrasekaran, Papernot 2021, arXiv 2109.13398), made again.

    uv run python examples/reproduce/thudi2021.py --preset cpu --data-root DATA --output docs/thudi2021

`DATA` holds `cifar-10-batches-py` (torchvision's folder, `--download` fetches it) and `aclImdb`, the original folder of
the Large Movie Review Dataset, or `IMDB` with its `train.csv.xz` and `test.csv.xz` (label, id, rating, text).

Measured are: whether the unlearning error orders settings as the verification error does, what the standard-deviation
penalty changes, and what forgetting costs beside retraining and SISA. Written are `OUTPUT.json` with every number,
`OUTPUT-*.png`, and the tables below the marker of `OUTPUT.md`. Finished jobs are kept in the JSON, and pretrained
weights in `--work`, so an interrupted study goes on where it stopped. A job runs on one thread of the processor.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from thudi2021_cost import cost
from thudi2021_data import check_data
from thudi2021_figures import draw_figures
from thudi2021_settings import PRESETS, Job, Preset, jobs_of
from thudi2021_tables import sections, summary_of, write_page
from thudi2021_toy import toy_rows
from thudi2021_tuning import finite, prepare, pretrain, tune

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from reporting import machine
from tables import machine_line

__all__ = ["main", "run_job", "study"]

Document = dict[str, Any]


def run_job(job: Job, preset: str, root: Path, work: Path) -> Document:
    """One job: its rows, and the seconds it took."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in (".*does not have many workers.*", ".*treespec.*"):
        warnings.filterwarnings("ignore", message=message)
    started = time.perf_counter()
    chosen = PRESETS[preset]
    if job.kind == "toy":
        rows: list[dict[str, Any]] = toy_rows(job.seed)
    else:
        task = chosen.task(job.task)
        if job.kind == "pretrain":
            rows = [pretrain(task, root, job, work, chosen.accelerator)]
        else:
            setting = prepare(task, root, job, work, chosen.accelerator)
            rows = tune(setting, job) if job.kind == "tune" else cost(setting, job)
    return {"seconds": round(time.perf_counter() - started, 2), "rows": [finite(row) for row in rows]}


def finished(jobs: Sequence[Job], workers: int, *arguments: Any) -> Iterator[tuple[Job, Document]]:
    """Jobs with their results, as they end; in this process for one worker."""
    if workers == 1:
        yield from ((job, run_job(job, *arguments)) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_job, job, *arguments): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def opened(path: Path, name: str) -> Document:
    """What is in the JSON already.

    Raises:
        SystemExit: it is of another preset, or of the same with other settings.
    """
    settings = json.loads(json.dumps(asdict(PRESETS[name])))
    if not path.exists():
        return {"preset": name, "settings": settings, "machine": machine(), "jobs": {}}
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    if (document["preset"], document["settings"]) != (name, settings):
        raise SystemExit(f"Expected {path} to be of the preset {name!r} as it is now. Name another --output.")
    return document


def save(document: Document, path: Path) -> None:
    """Replace the JSON, wholly or not at all; one line for each job."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dumps = partial(json.dumps, allow_nan=False, separators=(",", ":"))
    jobs = ",\n".join(f"{dumps(key)}:{dumps(job)}" for key, job in document["jobs"].items())
    head = dumps({key: value for key, value in document.items() if key != "jobs"})
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(f'{head[:-1]},"jobs":{{\n{jobs}\n}}}}\n', encoding="utf-8")
    os.replace(draft, path)


def study(preset: str, root: Path, output: Path, work: Path, *, workers: int = 2, repeats: int = 1000) -> int:
    """Run what is missing and write everything.

    Args:
        preset: Name of the preset.
        root: Folder of the data.
        output: Path of the files without their ending.
        work: Folder of the pretrained weights.
        workers: Processes; with one, jobs run in this process.
        repeats: Draws of every bootstrap.

    Returns:
        How many jobs were run.
    """
    chosen: Preset = PRESETS[preset]
    path = output.with_name(f"{output.name}.json")
    document = opened(path, preset)
    run = 0
    for stage in jobs_of(chosen):
        missing = [job for job in stage if job.key not in document["jobs"]]
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task(f"{preset}: {len(missing)} jobs", total=len(missing))
            for job, result in finished(missing, workers, preset, root, work):
                document["jobs"][job.key] = result
                save(document, path)
                progress.advance(bar)
                run += 1
    order = {job.key: job for stage in jobs_of(chosen) for job in stage}
    rows = [(job.kind, {**asdict(job), **row}) for key, job in order.items() for row in document["jobs"][key]["rows"]]
    tasks = document["settings"]["tasks"]
    document["summary"] = {name: finite(one) for name, one in summary_of(rows, tasks, repeats).items()}
    save(document, path)
    figures = draw_figures(rows, tasks, output)
    seconds = sum(document["jobs"][key]["seconds"] for key in order)
    head = (
        f"Preset `{preset}`, {chosen.seeds} seeds ({chosen.toy_seeds} for softmax regression); mean ± standard "
        f"deviation over seeds. {len(order)} jobs, one thread each, took {seconds / 60:.1f} minutes together. "
        + machine_line(document["machine"])
    )
    write_page(output.with_name(f"{output.name}.md"), [head, *sections(rows, tasks, figures, repeats)])
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, look for the data, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("thudi2021"), help="stem of the files written")
    parser.add_argument("--work", type=Path, help="folder of the pretrained weights; by default one that is removed")
    parser.add_argument("--workers", type=int, default=2, help="processes; 1 runs jobs in this one")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 into --data-root")
    options = parser.parse_args(arguments)
    check_data(options.data_root, PRESETS[options.preset].tasks, options.download)
    with tempfile.TemporaryDirectory(prefix="thudi2021-") as temporary:
        work = options.work or Path(temporary)
        run = study(options.preset, options.data_root, options.output, work, workers=options.workers)
    Console().print(f"{run} jobs were run; wrote {options.output}.json, .md and -*.png.")


if __name__ == "__main__":
    main()
