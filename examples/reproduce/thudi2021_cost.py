"""What forgetting costs: doing nothing, one gradient, retraining, and SISA with several numbers of shards."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer, seed_everything
from thudi2021_settings import Job
from thudi2021_tuning import Setting, compared, single_gradient, twins_of
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_unlearn import SisaTraining
from lightning_unlearn.functional.prediction_scores import modified_entropy
from lightning_unlearn.functional.privacy_risk import privacy_risk_score
from lightning_unlearn.procedures.outputs import collect_outputs

__all__ = ["cost"]

Row = dict[str, Any]
_MEASURED = ("test_accuracy", "forget_accuracy", "membership_auroc")


def cost(setting: Setting, job: Job) -> list[Row]:
    """One row for every way; SISA has one for every number of shards and kind of request.

    All start from the pretrained weights and see the fine-tuning data for the same number of epochs. `gradients` counts
    samples x passes. SISA's members learn with one slice, so its only advantage here is the number of shards.
    """
    twins = twins_of(setting, job)
    single, seconds = single_gradient(setting, twins.original, twins.initial_weights, setting.task.epochs)
    models = {"original": twins.original, "single": single, "retrained": twins.retrained}
    values = compared(models, setting)
    risk = _risks(models, setting, job)
    n, b, epochs = setting.task.tune_samples, len(setting.forget), setting.task.epochs
    one_model = sum(one.numel() * one.element_size() for one in twins.original.parameters())
    spent = {
        "original": ("nothing", 0.0, 0, 0),
        "single": ("single gradient", seconds, b, one_model),
        "retrained": ("retraining", twins.retrained_seconds, (n - b) * epochs, one_model),
    }
    rows: list[Row] = []
    for label, (way, took, gradients, storage) in spent.items():
        rows.append(
            {
                "way": way, "request": f"{b} samples", "seconds": took, "gradients": gradients, "storage": storage,
                "share": gradients / (n * epochs), "training_seconds": twins.original_seconds, "risk": risk[label],
                "v": values[label]["verification_error"],
                **{name: values[label][name] for name in _MEASURED},
            }
        )  # fmt: skip
    for shards in setting.task.shards:
        rows += _sisa(setting, job, shards)
    return rows


def _sisa(setting: Setting, job: Job, shards: int) -> list[Row]:
    """Train by SISA, and forget from copies of its folder: one sample, a batch of them, a batch of one subject."""
    requests: dict[str, tuple[list[Any], bool]] = {
        "1 sample": ([setting.forget[0]], False),
        f"{len(setting.forget)} samples": (list(setting.forget), False),
        f"{len(setting.forget)} samples of one subject": (["subject"], True),
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as home:
        for keyed in (False, True):
            training = partial(_training, setting, job, shards, keyed=keyed)
            started = time.perf_counter()
            before = training(Path(home) / f"trained-{keyed}").fit(setting.data)
            fitted = time.perf_counter() - started
            for name, (ids, needs_keys) in requests.items():
                if needs_keys is not keyed:
                    continue
                copied = Path(shutil.copytree(Path(home) / f"trained-{keyed}", Path(home) / "copy"))
                sisa = training(copied)
                plan, storage = sisa.plan(ids), sum(file.stat().st_size for file in copied.rglob("*.ckpt"))
                started = time.perf_counter()
                after = sisa.unlearn(ids, setting.data)
                seconds = time.perf_counter() - started
                values = compared({"before": before, "after": after}, setting, "after")
                rows.append(
                    {
                        "way": f"SISA, {shards} shards", "request": name, "seconds": seconds, "storage": storage,
                        "gradients": plan.sample_epochs, "training_seconds": fitted, "share": plan.share,
                        **{name: values["after"][name] for name in _MEASURED},
                    }
                )  # fmt: skip
                shutil.rmtree(copied)
    return rows


def _training(setting: Setting, job: Job, shards: int, folder: Path, *, keyed: bool) -> SisaTraining:
    owners = dict.fromkeys(setting.forget, "subject")
    trainer = setting.trainer()
    del trainer["max_epochs"]  # the slices have epochs of their own
    return SisaTraining(
        folder, module_factory=partial(setting.module, job.lr), epochs=setting.task.epochs, trainer=trainer,
        shards=shards, slices=1, seed=job.seed,
        sample_keys=(lambda position: owners.get(position, f"row-{position}")) if keyed else None,
    )  # fmt: skip


def _risks(models: Mapping[str, LightningModule], setting: Setting, job: Job) -> dict[str, float]:
    """Mean privacy risk score of the forgotten samples, from a shadow model fine-tuned on samples nobody else uses."""
    seed_everything(job.seed, verbose=False)
    shadow = setting.module(job.lr)
    trainer = Trainer(**setting.trainer())
    trainer.fit(shadow, DataLoader(setting.parts.shadow, setting.task.batch_size))

    def scores(model: LightningModule, data: Any) -> tuple[Tensor, Tensor]:
        outputs = collect_outputs(model, DataLoader(data, 500), device=setting.device)
        return modified_entropy(outputs.logits, outputs.targets), outputs.targets

    known = (*scores(shadow, setting.parts.shadow), *scores(shadow, setting.parts.test))
    forget = Subset(setting.parts.tune, setting.forget)
    return {label: float(privacy_risk_score(*scores(model, forget), *known).mean()) for label, model in models.items()}
