"""The measurements of Ding et al. (2024, 2025, arXiv 2410.03833) on fine-tuning as unlearning, made again.

    uv run python examples/reproduce/ding2024.py --preset cpu --data-root DATA --output docs/ding2024

`DATA` holds `FashionMNIST/raw` and `cifar-10-batches-py` (torchvision's folders, `--download` fetches them).

Measured are: losses of the linear model, original, fine-tuned, golden and masked, against closed forms; and one class
forgotten by fine-tuning (from originals that fit their images more or less), by its discriminative forms KL-FT, ICE-FT
and CE-FT, and by masks made of the data to keep or to forget. Written are `OUTPUT.json` with every number,
`OUTPUT-*.png`, and the tables below the marker of `OUTPUT.md`. Finished jobs are kept in the JSON, so an interrupted
study goes on where it stopped. A job runs on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ding2024_classes import class_rows, fit_rows
from ding2024_figures import draw_figures
from ding2024_linear import linear_rows
from ding2024_settings import PRESETS, Job, jobs_of
from ding2024_tables import sections
from images import check_images
from rich.console import Console
from studies import Document, finite, head_line, options_for, quiet, run_stages, write_page

__all__ = ["main", "run_job", "study"]


def run_job(job: Job, preset: str, root: Path) -> Document:
    """One job: its rows, and the seconds it took."""
    quiet()
    started = time.perf_counter()
    chosen = PRESETS[preset]
    if job.kind == "linear":
        rows = linear_rows(chosen.linear, job.seed)
    elif job.kind == "fit":
        rows = fit_rows(chosen, job.task, root, job.seed)
    else:
        rows = class_rows(chosen, job.task, root, job.forgotten, job.seed)
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
    job_runner = partial(run_job, preset=preset, root=root)
    path = output.with_name(f"{output.name}.json")
    document, run = run_stages(path, preset, asdict(chosen), [jobs], job_runner, workers=workers)
    rows = [{**asdict(job), **row} for job in jobs for row in document["jobs"][job.key]["rows"]]
    figures = draw_figures(rows, chosen, output)
    seeds = f"{chosen.seeds} seeds ({chosen.linear.seeds} for the linear model)"
    parts = [head_line(document, seeds, [job.key for job in jobs]), *sections(rows, chosen, figures)]
    write_page(output.with_name(f"{output.name}.md"), "ding2024.py", "Fine-tuning as unlearning: measured", parts)
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, look for the data, run."""
    options = options_for(__doc__ or "", "ding2024", PRESETS).parse_args(arguments)
    check_images(options.data_root, [task.dataset for task in PRESETS[options.preset].tasks], options.download)
    run = study(options.preset, options.data_root, options.output, workers=options.workers)
    Console().print(f"{run} jobs were run; wrote {options.output}.json, .md and -*.png.")


if __name__ == "__main__":
    main()
