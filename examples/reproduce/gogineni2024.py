"""Layer-wise partial unlearning (Gogineni & Nadimi 2024, arXiv 2403.07611): its claims, measured on small networks.

    uv run python examples/reproduce/gogineni2024.py --preset cpu --data-root DATA --output docs/gogineni2024

`DATA` holds `MNIST/raw` and `cifar-10-batches-py` (torchvision's folders, `--download` fetches them).

Algorithm 1: what a training changed in steps with forgotten samples is pruned and subtracted, over the fraction that
is kept, beside the same for an innocent group (the placebo). Algorithms 2 and 3: label flipping and gradient ascent of
which every step changes a fraction of each layer, beside a smaller learning rate. Written are `OUTPUT.json` with every
number, `OUTPUT-*.png`, and the tables below the marker of `OUTPUT.md`. Finished jobs are kept in the JSON, so an
interrupted study goes on where it stopped. A job runs on one thread of the processor.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from gogineni2024_figures import draw_figures
from gogineni2024_runs import amnesiac_rows, storage_rows, update_rows
from gogineni2024_settings import PRESETS, Job, jobs_of
from gogineni2024_tables import sections
from gogineni2024_training import prepare
from images import check_images
from rich.console import Console
from studies import Document, finite, head_line, options_for, quiet, run_stages, write_page

from lightning_unlearn.exceptions import UnlearningWarning

__all__ = ["main", "run_job", "study"]

_RUNS = {"amnesiac": amnesiac_rows, "updates": update_rows, "storage": storage_rows}


def run_job(job: Job, preset: str, root: Path) -> Document:
    """One job: its rows, and the seconds it took."""
    quiet()
    started = time.perf_counter()
    chosen = PRESETS[preset]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnlearningWarning)  # what they say of plans and probes is in the rows
        setting = prepare(chosen.task(job.task), root, job, chosen.accelerator)
        rows = _RUNS[job.kind](setting, chosen)
    return {"seconds": round(time.perf_counter() - started, 2), "rows": [finite(row) for row in rows]}


def study(preset: str, root: Path, output: Path, *, workers: int = 2) -> int:
    """Run what is missing and write everything.

    Args:
        preset: Name of the preset.
        root: Folder of the data.
        output: Path of the files without their ending.
        workers: Processes; with one, jobs run in this process.

    Returns:
        How many jobs were run.
    """
    chosen = PRESETS[preset]
    jobs = jobs_of(chosen)
    path = output.with_name(f"{output.name}.json")
    job_runner = partial(run_job, preset=preset, root=root)
    document, run = run_stages(path, preset, asdict(chosen), [jobs], job_runner, workers=workers)
    rows = [{**asdict(job), **row} for job in jobs for row in document["jobs"][job.key]["rows"]]
    tasks = [task.images for task in chosen.tasks]
    figures = draw_figures(rows, tasks, output)
    parts = [head_line(document, f"{chosen.seeds} seeds", [job.key for job in jobs]), *sections(rows, tasks, figures)]
    write_page(
        output.with_name(f"{output.name}.md"), "gogineni2024.py", "Layer-wise partial unlearning: measured", parts
    )
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, look for the data, run."""
    options = options_for(__doc__ or "", "gogineni2024", PRESETS).parse_args(arguments)
    check_images(options.data_root, [task.images for task in PRESETS[options.preset].tasks], options.download)
    run = study(options.preset, options.data_root, options.output, workers=options.workers)
    Console().print(f"{run} jobs were run; wrote {options.output}.json, .md and -*.png.")


if __name__ == "__main__":
    main()
