"""One arm of the demo: train once with a recorder, retrain twins, run every method for two contributors, measure.

An arm is one seed and one placement: `"grouped"` puts a contributor's images into the same batches, `"random"` is
ordinary shuffling. It is the code a user would write, in one function after the other.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.api import unlearn
from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.callbacks.leave_out import LeaveOut
from lightning_unlearn.callbacks.subject_grouping import SubjectGrouping
from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.deltas.plan import DeletionPlan
from lightning_unlearn.demo.digits import DigitsCNN, DigitsData
from lightning_unlearn.exceptions import UnlearningWarning
from lightning_unlearn.methods import (
    Amnesiac,
    FineTune,
    LossMethod,
    PartialAmnesiac,
    Retrain,
    UnlearningMethod,
    WeightEdit,
)
from lightning_unlearn.procedures.compare import compare_models
from lightning_unlearn.procedures.evaluate import evaluate
from lightning_unlearn.procedures.outcome import UnlearningResult
from lightning_unlearn.results import EvaluationResult
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import Split

__all__ = ["ARMS", "CONTRIBUTORS", "PLACEBOS", "VARIANTS", "ArmResult", "Placement", "Row", "run_arm"]

Placement: TypeAlias = Literal["grouped", "random"]
ARMS: tuple[Placement, ...] = ("grouped", "random")
CONTRIBUTORS = ("mislabelled", "clean")
EPOCHS = 20
REPAIR_STEPS = 50

VARIANTS: dict[str, tuple[UnlearningMethod, LossMethod | None]] = {
    "amnesiac": (Amnesiac(), None),
    "amnesiac + repair": (Amnesiac(), FineTune(max_steps=REPAIR_STEPS)),
    "partial amnesiac": (PartialAmnesiac(keep=0.1), None),
    "partial amnesiac + repair": (PartialAmnesiac(keep=0.1), FineTune(max_steps=REPAIR_STEPS)),
    "fine-tune only": (FineTune(max_steps=REPAIR_STEPS), None),
}
"""Label -> method and repair."""

PLACEBOS = {label: f"placebo: {label}" for label, (method, _) in VARIANTS.items() if isinstance(method, WeightEdit)}
"""Label -> label of the same pass with an innocent bystander's steps in the contributor's place."""


@dataclass(frozen=True, slots=True)
class Row:
    """One model of one contributor's comparison.

    Attributes:
        contributor: Whose images were to be forgotten.
        label: The model.
        values: Metric name -> number: fractions, nats or seconds.
    """

    contributor: str
    label: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ArmResult:
    """What one arm measured; plain data, so it can come from another process.

    Attributes:
        seed: The seed.
        placement: How contributors were placed.
        rows: One per contributor and model.
        plans: Contributor -> the plan's numbers and recommendation.
        verdicts: Contributor -> label -> evaluation against the twin.
        train_seconds: Recorded training.
        store_bytes: Size of the store after training, every delta whole (keep = 1).
    """

    seed: int
    placement: Placement
    rows: tuple[Row, ...]
    plans: Mapping[str, Mapping[str, Any]]
    verdicts: Mapping[str, Mapping[str, EvaluationResult]]
    train_seconds: float
    store_bytes: int


def run_arm(
    seed: int, placement: Placement, folder: Path, progress: Callable[[str], None] = lambda text: None
) -> ArmResult:
    """Run one arm; its store goes to `folder`, `progress` gets a short text before each piece of work."""
    progress("training")
    url = str(folder / f"{placement}-{seed}")
    data = DigitsData(seed)
    recorder = DeltaRecorder(url, keep=1.0, sample_keys=keys_of(data))
    original, train_seconds = train(seed, placement, data, recorder)
    store_bytes = DeltaStore.open(url).info().bytes
    rows: list[Row] = []
    plans: dict[str, Mapping[str, Any]] = {}
    verdicts: dict[str, Mapping[str, EvaluationResult]] = {}
    for contributor in CONTRIBUTORS:
        progress(f"{contributor}: retraining")
        twin = unlearn_demo(original, url, seed, placement, contributor, Retrain(), None)
        # Other initial weights, and the contributor left out as for the twin: how much do two retrainings differ?
        left_out = LeaveOut(data.contributors[contributor])
        independent, seconds = train(seed + 1000, placement, DigitsData(seed), left_out)
        models: dict[str, LightningModule] = {"original": original, "retrained twin": twin.model}
        models["independent retraining"] = independent
        costs = {"original": train_seconds, "retrained twin": twin.seconds, "independent retraining": seconds}
        for label, (method, then) in VARIANTS.items():
            progress(f"{contributor}: {label}")
            # One pass is meant; the others are experiments on the same original, which only read the store.
            kept = label == "amnesiac + repair"
            result = unlearn_demo(original, url, seed, placement, contributor, method, then, record=kept)
            models[label], costs[label] = result.model, result.seconds
            if label == "amnesiac" and result.plan is not None:
                plans[contributor] = describe_plan(result.plan)
        for label, placebo in PLACEBOS.items():
            progress(f"{contributor}: {placebo}")
            method, then = VARIANTS[label]
            result = unlearn_demo(original, url, seed, placement, "bystander", method, then, control_for=contributor)
            models[placebo], costs[placebo] = result.model, result.seconds
        progress(f"{contributor}: measuring")
        loaders = evaluation_loaders(DigitsData(seed), contributor)
        truth = data.true_labels[list(data.contributors[contributor])]
        measured = compare_models(models, loaders, reference="retrained twin", true_targets=truth)
        rows += [Row(contributor, label, {**values, "seconds": costs[label]}) for label, values in measured.items()]
        verdicts[contributor] = judge(models, loaders, truth)
    return ArmResult(seed, placement, tuple(rows), plans, verdicts, train_seconds, store_bytes)


def keys_of(data: DigitsData) -> list[str]:
    """Stable keys: the contributor's name, or the image's own where nobody gave it."""
    return [subject or f"image-{row}" for row, subject in enumerate(data.subjects)]


def trainer_arguments(placement: Placement, data: DigitsData) -> dict[str, Any]:
    """The Trainer a user has anyway; one callback more groups contributors."""
    grouping = [SubjectGrouping(data.subjects, seed=data.seed)] if placement == "grouped" else []
    return {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": grouping,
    }


def train(seed: int, placement: Placement, data: DigitsData, *callbacks: Callback) -> tuple[DigitsCNN, float]:
    """Train from scratch; the model and the seconds it took."""
    seed_everything(seed, verbose=False)
    model = DigitsCNN()
    arguments = trainer_arguments(placement, data)
    arguments["callbacks"] = [*arguments["callbacks"], *callbacks]
    started = time.perf_counter()
    Trainer(**arguments).fit(model, datamodule=data)
    return model, time.perf_counter() - started


def unlearn_demo(
    original: LightningModule,
    url: str,
    seed: int,
    placement: Placement,
    subject: str,
    method: UnlearningMethod,
    then: LossMethod | None,
    *,
    record: bool = False,
    control_for: str | None = None,
) -> UnlearningResult:
    """One request; forced, because the random arm is there to show what the plan warns of."""
    data = DigitsData(seed)
    with warnings.catch_warnings():
        # The plan's and the probe's warnings are shown in the report, once, instead of once per run.
        warnings.simplefilter("ignore", UnlearningWarning)
        return unlearn(
            original,
            [subject],
            method=method,
            data=data,
            store=url,
            trainer=trainer_arguments(placement, data) if isinstance(method, Retrain) else None,
            then=then,
            seed=seed,
            record=record,
            control_for=None if control_for is None else [control_for],
            force=True,
            probe_samples=500,
            sample_keys=keys_of(data),
        )


def describe_plan(plan: DeletionPlan) -> dict[str, Any]:
    """The plan's numbers and its advice."""
    return {
        "touched_fraction": plan.touched_fraction,
        "relative_norm": plan.relative_norm,
        "collateral": len(plan.collateral_ids),
        "placement": plan.placement,
        "mean_share": plan.mean_share,
        "damage": plan.damage,
        "specificity": plan.specificity,
        "recommendation": plan.recommendation,
    }


def evaluation_loaders(data: DigitsData, contributor: str) -> dict[Split, DataLoader[Any]]:
    """The contributor's images, all others, and the test images."""
    split = UnlearningDataModule(data, [contributor], sample_keys=keys_of(data))
    return {"forget": split.forget_loader(), "retain": split.retain_loader(), "test": data.test_dataloader()}


def judge(
    models: Mapping[str, LightningModule], loaders: Mapping[Split, DataLoader[Any]], truth: Tensor
) -> dict[str, EvaluationResult]:
    """What the evidence allows to be said of each method, in words, against the twin and the placebo."""
    verdicts = {}
    for label in VARIANTS:
        verdicts[label] = evaluate(
            models["original"],
            models[label],
            retrained=models["retrained twin"],
            data={split: loaders[split] for split in ("forget", "test")},
            placebo=models[PLACEBOS[label]] if label in PLACEBOS else None,
            references=[models["independent retraining"]],
            true_targets=truth,
            paired=True,
        )
    return verdicts
