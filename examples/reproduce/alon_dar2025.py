"""How width bears on unlearning (Alon and Dar 2025, arXiv 2503.08633), measured again.

    uv run python examples/reproduce/alon_dar2025.py --preset cpu --data-root DATA --output docs/alon_dar2025

`DATA` holds `cifar-10-batches-py` and `FashionMNIST` in torchvision's layout (`--download` fetches them).

Networks of several widths are trained on images of which 200 are forgotten, for privacy (their labels are right) or to
remove a bias (their labels are wrong), by SCRUB, NegGrad+ and L1-sparse unlearning, each tuned on validation data for
every width, goal and lambda. The settings are drawn at random from the space that the method declares, the defaults
first; the same trials serve all lambdas. Each winner is run again and measured on test data, next to the original and a
retrained model. Written are `OUTPUT.json` with every number, `OUTPUT-*.png`, and the tables below the marker of
`OUTPUT.md`. Finished jobs are kept in the JSON, so an interrupted study goes on where it stopped. A job runs on one
thread of the processor. Tuning needs the extra `tune`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from alon_dar2025_figures import draw_figures
from alon_dar2025_runs import run_width
from alon_dar2025_settings import PRESETS, Job, jobs_of
from alon_dar2025_tables import sections, summary_of
from images import check_images
from rich.console import Console
from studies import Document, finite, head_line, options_for, quiet, run_stages, save_document, write_page

__all__ = ["main", "run_job", "study"]


def run_job(job: Job, preset: str, root: Path) -> Document:
    """One job: its rows, and the seconds it took."""
    quiet()
    started = time.perf_counter()
    rows = run_width(job, PRESETS[preset], root)
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
    path = output.with_name(f"{output.name}.json")
    jobs = jobs_of(chosen)
    job_runner = partial(run_job, preset=preset, root=root)
    document, run = run_stages(path, preset, asdict(chosen), [jobs], job_runner, workers=workers)
    rows = [{**asdict(job), **row} for job in jobs for row in document["jobs"][job.key]["rows"]]
    tasks = [{**asdict(task), "name": task.name} for task in chosen.tasks]
    document["summary"] = finite(summary_of(rows, tasks))
    save_document(document, path)
    figures = draw_figures(rows, tasks, document["settings"], output)
    seeds = f"{'/'.join(map(str, sorted({task.seeds for task in chosen.tasks})))} seeds"
    head = head_line(document, seeds, [job.key for job in jobs])
    parts = [head, *sections(rows, tasks, document["settings"], figures)]
    write_page(output.with_name(f"{output.name}.md"), "alon_dar2025.py", "Width and unlearning: measured", parts)
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, look for the data, run."""
    parser = options_for(__doc__ or "", "alon_dar2025", PRESETS)
    options = parser.parse_args(arguments)
    names = [task.dataset for task in PRESETS[options.preset].tasks]
    check_images(options.data_root, names, options.download)
    run = study(options.preset, options.data_root, options.output, workers=options.workers)
    Console().print(f"{run} jobs were run; wrote {options.output}.json, .md and -*.png.")


if __name__ == "__main__":
    main()
