"""One job of `alon_dar2025.py`: a width and a seed, from the trainings to what the tuned methods do on test data."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from alon_dar2025_data import Drawn, StudyData, draw
from alon_dar2025_models import Classifier, build
from alon_dar2025_regions import Regions, packed
from alon_dar2025_settings import GOALS, Goal, Job, Preset, Task
from lightning import LightningModule, Trainer
from studies import Row
from torch import Tensor

from lightning_unlearn import unlearn
from lightning_unlearn.exceptions import UnlearningWarning
from lightning_unlearn.methods import L1Sparse, NegGradPlus, Scrub, UnlearningMethod
from lightning_unlearn.report import decision_plane
from lightning_unlearn.tuning import Objective, TuningResult, tune

__all__ = ["run_width"]


def methods_for(preset: Preset) -> dict[str, UnlearningMethod]:
    """The methods, by the names of `alon_dar2025_settings.METHODS`; what tuning does not vary has its default."""
    return {
        "SCRUB": Scrub(),
        "NegGrad+": NegGradPlus(check_every=preset.check_every),
        "L1-sparse": L1Sparse(),
    }


def trainer_arguments(preset: Preset) -> dict[str, Any]:
    """Of trainings and of passes: nothing is written or shown."""
    return {
        "accelerator": preset.accelerator, "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip


def trained(task: Task, preset: Preset, job: Job, data: StudyData) -> Classifier:
    """A network of the job's width, trained on some data from the seed's initial weights."""
    torch.manual_seed(job.seed)
    steps = task.epochs * len(data.train_dataloader())
    model = Classifier(build(task.family, data.train.tensors[0].shape[1], job.width), task.lr, steps)
    trainer = Trainer(**trainer_arguments(preset), max_epochs=task.epochs, limit_val_batches=0)
    trainer.fit(model, train_dataloaders=data.train_dataloader())
    return model.cpu().eval()


@torch.no_grad()
def answers(model: LightningModule, images: Tensor) -> Tensor:
    """The class that a model gives each image, int64 (N,)."""
    model.eval()
    return torch.cat([model(part).argmax(dim=1) for part in images.split(500)])


def measured(model: LightningModule, goal: Goal, drawn: Drawn, labels: Tensor) -> Row:
    """Errors of a model on what was forgotten, on what was kept, and on test data, and how far the goal is missed."""
    images, targets = drawn.test.tensors
    found, n = answers(model, drawn.images), drawn.forgotten
    test = float((answers(model, images) != targets).double().mean())
    forget = float((found[:n] != labels[:n]).double().mean())
    return {
        "test_error": test,
        "forget_error": forget,
        "retain_error": float((found[n:] != labels[n:]).double().mean()),
        "true_error": float((found[:n] != drawn.labels[:n]).double().mean()),
        "goal_error": abs(forget - test) if goal == "privacy" else 1.0 - forget,
    }


def tuned(
    model: Classifier, name: str, goal: Goal, data: StudyData, drawn: Drawn, preset: Preset, seed: int
) -> tuple[TuningResult, Iterator[tuple[list[float], Row, LightningModule]]]:
    """The trials of one method for one goal, and each winner, run again: its lambdas, its trial, its model."""
    passes: dict[str, Any] = {"data": data, "seed": seed, "trainer": trainer_arguments(preset)}
    first = Objective(goal, lambda_=preset.lambdas[0])
    result = tune(
        model, drawn.ids, methods=[methods_for(preset)[name]], objective=first, trials=preset.trials,
        sampler="random", pruner=None, **passes,
    )  # fmt: skip
    winners: dict[int, list[float]] = {}
    for weight in preset.lambdas:
        winners.setdefault(result.chosen(Objective(goal, lambda_=weight)).number, []).append(weight)

    def again() -> Iterator[tuple[list[float], Row, LightningModule]]:
        for weights in winners.values():
            trial = result.chosen(Objective(goal, lambda_=weights[0]))
            started = time.perf_counter()
            # As in tuning, and without the probe, which would undo a pass instead of letting its damage be seen.
            with warnings.catch_warnings():
                # A pass that stops before its first step is a finding here, put down as such.
                warnings.simplefilter("ignore", UnlearningWarning)
                done = unlearn(model, drawn.ids, method=trial.method, record=False, probe_samples=0, **passes)
            before = model.state_dict()
            same = all(torch.equal(one.cpu(), before[key]) for key, one in done.model.state_dict().items())
            row = {
                "unchanged": same,
                "trial": trial.number, "is_default": trial.is_default, "settings": dict(trial.settings),
                "validation_error": trial.validation_error, "seconds": time.perf_counter() - started,
            }  # fmt: skip
            yield weights, row, done.model.cpu().eval()

    return result, again()


def of_goal(
    goal: Goal, originals: Mapping[Goal, Classifier], retrained: Classifier, scene: tuple[Any, ...]
) -> Iterator[Row]:
    """Rows of one goal, and a picture where there is to be one."""
    drawn, data, preset, job, pictured = scene
    original, labels = originals[goal], data[goal].train.tensors[1]
    regions = Regions(original, drawn, preset, job.seed)
    common = {"kind": "model", "goal": goal}
    yield {**common, "model": "original", **measured(original, goal, drawn, labels)}
    yield {**common, "model": "retrained", **measured(retrained, goal, drawn, labels), **regions.change(retrained)}
    shown = {"original": original}
    for name in methods_for(preset):
        result, winners = tuned(original, name, goal, data[goal], drawn, preset, job.seed)
        for weights, trial, model in winners:
            row = {**measured(model, goal, drawn, labels), **regions.change(model), **trial}
            yield from ({**common, "model": name, "lambda": weight, **row} for weight in weights)
            if preset.shown_lambda in weights and all(one.isfinite().all() for one in model.state_dict().values()):
                shown[name] = model
        seconds = [trial.seconds for trial in result.trials if trial.seconds is not None]
        lost = sum(trial.rates is None for trial in result.trials)
        yield {**common, "kind": "tuning", "model": name, "trial_seconds": seconds, "lost": lost}
    if pictured:
        # No choice by eye: the first forgotten image, and the first two held-out ones.
        others = drawn.test.tensors[0][:2]
        models = {**shown, "retrained": retrained}
        plane = decision_plane(models, drawn.images[0], *others, resolution=preset.pictured)
        three = [int(labels[0]), *drawn.test.tensors[1][:2].tolist()]
        yield {**common, "kind": "plane", "labels": three, "true_label": int(drawn.labels[0]), **packed(plane)}


def run_width(job: Job, preset: Preset, root: Path) -> list[Row]:
    """All rows of a job.

    Args:
        job: Task, width and seed.
        preset: What is done at which size.
        root: Folder of the data.
    """
    task = preset.task(job.task)
    drawn = draw(task, root, job.seed)
    data = {
        goal: StudyData(drawn, drawn.labels if goal == "privacy" else drawn.wrong_labels, task.batch_size, job.seed)
        for goal in GOALS
    }
    kept = StudyData(drawn, drawn.labels, task.batch_size, job.seed, retained=True)
    # Without the forgotten images nothing is left of their labels: one retrained model serves both goals.
    retrained = trained(task, preset, job, kept)
    originals = {goal: trained(task, preset, job, one) for goal, one in data.items()}
    pictured = job.seed == 0 and job.width in (min(task.widths), max(task.widths))
    size = {"kind": "network", "parameters": sum(one.numel() for one in retrained.parameters())}
    scene = (drawn, data, preset, job, pictured)
    return [size, *(row for goal in GOALS for row in of_goal(goal, originals, retrained, scene))]
