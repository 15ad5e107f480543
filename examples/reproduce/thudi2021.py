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

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from studies import Document, finite, head_line, options_for, quiet, run_stages, save_document, write_page
from thudi2021_cost import cost
from thudi2021_data import check_data
from thudi2021_figures import draw_figures
from thudi2021_settings import PRESETS, Job, Preset, jobs_of
from thudi2021_tables import sections, summary_of
from thudi2021_toy import toy_rows
from thudi2021_tuning import prepare, pretrain, tune

__all__ = ["main", "run_job", "study"]


def run_job(job: Job, preset: str, root: Path, work: Path) -> Document:
    """One job: its rows, and the seconds it took."""
    quiet()
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
    stages = jobs_of(chosen)
    job_runner = partial(run_job, preset=preset, root=root, work=work)
    document, run = run_stages(path, preset, asdict(chosen), stages, job_runner, workers=workers)
    order = {job.key: job for stage in stages for job in stage}
    rows = [(job.kind, {**asdict(job), **row}) for key, job in order.items() for row in document["jobs"][key]["rows"]]
    tasks = document["settings"]["tasks"]
    document["summary"] = {name: finite(one) for name, one in summary_of(rows, tasks, repeats).items()}
    save_document(document, path)
    figures = draw_figures(rows, tasks, output)
    seeds = f"{chosen.seeds} seeds ({chosen.toy_seeds} for softmax regression)"
    parts = [head_line(document, seeds, order), *sections(rows, tasks, figures, repeats)]
    write_page(output.with_name(f"{output.name}.md"), "thudi2021.py", "Unrolling SGD: measured", parts)
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, look for the data, run."""
    parser = options_for(__doc__ or "", "thudi2021", PRESETS)
    parser.add_argument("--work", type=Path, help="folder of the pretrained weights; by default one that is removed")
    options = parser.parse_args(arguments)
    check_data(options.data_root, PRESETS[options.preset].tasks, options.download)
    with tempfile.TemporaryDirectory(prefix="thudi2021-") as temporary:
        work = options.work or Path(temporary)
        run = study(options.preset, options.data_root, options.output, work, workers=options.workers)
    Console().print(f"{run} jobs were run; wrote {options.output}.json, .md and -*.png.")


if __name__ == "__main__":
    main()
