"""Do tuned settings beat the defaults of the package on data that tuning never saw?

    uv run python examples/reproduce/tuning_study.py --data-root DATA --output docs/tuning-study

`DATA` holds torchvision's `FashionMNIST/raw` (`--download` fetches it). For every method, data set, goal and seed a
small network is trained, the method is tuned on validation data with its defaults as the first trial, and defaults and
winner are measured on test data: the difference of the two is paired. Written are `OUTPUT.json`, `OUTPUT-*.png`, and
the tables below the marker of `OUTPUT.md`. Finished jobs are kept; an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from images import check_images
from lightning import LightningModule, Trainer, seed_everything
from rich.console import Console
from studies import Document, finite, head_line, options_for, quiet, run_stages, save_document, write_page
from tuning_study_tables import draw_figures, sections

from lightning_unlearn import Retrain, unlearn
from lightning_unlearn.methods import get_method
from lightning_unlearn.procedures.outputs import collect_outputs
from lightning_unlearn.tuning import ErrorRates, Objective, TrialRecord, tune

sys.path.append(str(Path(__file__).parents[1]))

from compare_data import Data, Task, make_task, network_for

SCENARIO = {"privacy": "random", "bias_removal": "mislabelled"}
"""What is forgotten for which goal: samples drawn at random, or samples that were trained on with a wrong label."""
TRAINER = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """What is run.

    Attributes:
        sizes: Data set -> training, validation and test rows.
        forgotten: Data set -> rows to forget.
        methods: Names.
        trials: Of each method, defaults included.
        seeds: Repetitions; a seed draws data, start and candidates.
        lambda_: Of the objective.
    """

    sizes: dict[str, tuple[int, int, int]]
    forgotten: dict[str, int]
    methods: tuple[str, ...]
    trials: int
    seeds: int
    lambda_: float = 0.5


@dataclass(frozen=True)
class Job:
    """Train the original and the retrained network (no method), or tune one method."""

    dataset: str
    goal: str
    seed: int
    method: str = ""

    @property
    def key(self) -> str:
        """Its name in the JSON."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


METHODS = (
    "FineTune", "L1Sparse", "NegGradPlus", "Scrub", "GradientAscent", "LabelFlipping", "SalUn", "BadTeacher",
    "ICEFineTune", "RetentionMasking", "BoundaryShrink", "SelectiveSynapticDampening", "InfluenceUnlearning",
)  # fmt: skip
PRESETS = {
    "smoke": Preset({"digits": (200, 100, 100)}, {"digits": 20}, ("L1Sparse", "NegGradPlus"), 3, 2),
    "cpu": Preset(
        {"digits": (1000, 300, 400), "fashion-mnist": (3000, 1000, 5000)},
        {"digits": 50, "fashion-mnist": 100},
        METHODS,
        trials=12,
        seeds=5,
    ),
}


def task_of(job: Job, preset: Preset, root: Path) -> Task:
    """The data of a job; the same for all methods."""
    return make_task(
        job.dataset, SCENARIO[job.goal], job.seed, str(root), sizes=preset.sizes[job.dataset],
        forgotten=preset.forgotten[job.dataset],
    )  # fmt: skip


def train(job: Job, task: Task, path: Path) -> list[dict[str, Any]]:
    """The original network, kept for the methods, and the retrained one."""
    seed_everything(job.seed, verbose=False)
    module = network_for(task)()
    start = {name: one.clone() for name, one in module.state_dict().items()}
    Trainer(**TRAINER, max_epochs=task.epochs).fit(module, Data(task))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), path)

    def factory() -> LightningModule:
        made = network_for(task)()
        made.load_state_dict(start)
        return made

    retrained = unlearn(
        module, task.forget, method=Retrain(module_factory=factory), data=Data(task), seed=job.seed,
        trainer={**TRAINER, "max_epochs": task.epochs},
    ).model  # fmt: skip
    # The original stands in for itself: what a method cannot lose is what it had.
    original = rates_of(module, task)
    return [
        {"what": name, **asdict(rates_of(one, task, original.validation))}
        for name, one in (("original", module), ("retrained", retrained))
    ]


def rates_of(module: LightningModule, task: Task, original: float = float("nan")) -> ErrorRates:
    """Errors with test data where tuning has validation data."""
    data = Data(task)
    x, y = (one[task.forget] for one in task.train.tensors)
    forget = collect_outputs(module, [(x, y)])
    test = collect_outputs(module, data.test_dataloader())
    return ErrorRates(*(1 - float(one.correct.double().mean()) for one in (forget, test)), original)


def compare(job: Job, task: Task, path: Path, preset: Preset) -> list[dict[str, Any]]:
    """Tune one method; its defaults and its winner on test data."""
    module = network_for(task)()
    module.load_state_dict(torch.load(path, weights_only=True))
    objective = Objective(job.goal, preset.lambda_)  # type: ignore[arg-type]
    result = tune(
        module, task.forget, methods=get_method(job.method)(), data=Data(task), objective=objective,
        trials=preset.trials, trainer=TRAINER, seed=job.seed,
    )  # fmt: skip
    original = rates_of(module, task).validation

    def row(what: str, trial: TrialRecord) -> dict[str, Any]:
        again = unlearn(
            module, task.forget, method=trial.method, data=Data(task), trainer=TRAINER, seed=job.seed, probe_samples=0
        ).model
        rates = rates_of(again, task, original)
        if trial.rates is None or rates.forget != trial.forget_error:
            raise RuntimeError(f"trial {trial.number} of {job.key} does not repeat")
        return {
            "what": what, "trial": trial.number, "settings": dict(trial.settings), "tuning_value": trial.value,
            "goal_error": objective.goal_error(rates), "test_error": rates.validation, "value": objective.value(rates),
        }  # fmt: skip

    seconds = [trial.seconds for trial in result.trials if trial.seconds]
    rows = [row("default", result.default), row("tuned", result.best)]
    return [{**one, "trials": len(result.trials), "pass_seconds": sum(seconds) / len(seconds)} for one in rows]


def run_job(job: Job, preset: str, root: Path, work: Path) -> Document:
    """One job: its rows, and the seconds it took."""
    quiet()
    started = time.perf_counter()
    chosen = PRESETS[preset]
    task, path = task_of(job, chosen, root), work / preset / f"{job.dataset}-{job.goal}-{job.seed}.pt"
    if job.method and not path.exists():  # the folder of an earlier run was removed
        train(job, task, path)
    rows = compare(job, task, path, chosen) if job.method else train(job, task, path)
    return {"seconds": round(time.perf_counter() - started, 2), "rows": [finite(row) for row in rows]}


def study(preset: str, root: Path, output: Path, work: Path, *, workers: int = 2) -> int:
    """Run what is missing and write everything; how many jobs were run."""
    chosen = PRESETS[preset]
    cases = [(dataset, goal, seed) for dataset in chosen.sizes for goal in SCENARIO for seed in range(chosen.seeds)]
    stages = [
        [Job(*case) for case in cases],
        [Job(*case, method) for method in chosen.methods for case in reversed(cases)],
    ]
    path = output.with_name(f"{output.name}.json")
    job_runner = partial(run_job, preset=preset, root=root, work=work)
    document, count = run_stages(path, preset, asdict(chosen), stages, job_runner, workers=workers)
    order = {job.key: job for stage in stages for job in stage}
    rows = [{**asdict(job), **row} for key, job in order.items() for row in document["jobs"][key]["rows"]]
    save_document(document, path)
    figures = draw_figures(rows, output)
    head = head_line(document, f"{chosen.seeds} seeds", order)
    parts = [f"{head} {chosen.trials} trials a method, lambda {chosen.lambda_:g}.", *sections(rows, figures)]
    write_page(output.with_name(f"{output.name}.md"), "tuning_study.py", "Tuned settings against the defaults", parts)
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, look for the data, run."""
    parser = options_for(__doc__ or "", "tuning-study", PRESETS)
    parser.add_argument("--work", type=Path, help="folder of the trained weights; by default one that is removed")
    options = parser.parse_args(arguments)
    if "fashion-mnist" in PRESETS[options.preset].sizes:
        check_images(options.data_root, ["Fashion-MNIST"], options.download)
    with tempfile.TemporaryDirectory(prefix="tuning-study-") as temporary:
        work = options.work or Path(temporary)
        count = study(options.preset, options.data_root, options.output, work, workers=options.workers)
    Console().print(f"{count} jobs were run; wrote {options.output}.json, .md and -*.png.")


if __name__ == "__main__":
    main()
