"""The jobs of `gogineni2024.py`: each returns rows, one for every model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gogineni2024_settings import PRUNES, Preset
from gogineni2024_training import QUIET, Classifier, ForgetSet, Setting
from lightning import LightningModule

from lightning_unlearn import (
    Amnesiac,
    DeltaRecorder,
    DeltaStore,
    FineTune,
    GradientAscent,
    LabelFlipping,
    NegGradPlus,
    PartialAmnesiac,
    PartialGradientAscent,
    PartialLabelFlipping,
    PartialUpdates,
    unlearn,
)
from lightning_unlearn.methods.base import UnlearningMethod
from lightning_unlearn.methods.loss_method import LossMethod
from lightning_unlearn.procedures.guards import judge_probe
from lightning_unlearn.procedures.outcome import UnlearningResult

__all__ = ["LR_SCALES", "OBJECTIVES", "amnesiac_rows", "storage_rows", "update_rows"]

Row = dict[str, Any]
OBJECTIVES = (
    "label flipping, forget data alone",
    "label flipping, with retain data",
    "gradient ascent",
    "NegGrad+",
)
LR_SCALES = dict(zip(OBJECTIVES, (0.1, 0.1, 0.1, 1 / 3), strict=True))
"""Factors on the training's learning rate: the defaults of the methods."""


@dataclass(frozen=True)
class _Study:
    """What all passes of one job share."""

    setting: Setting
    preset: Preset
    original: Classifier

    def unlearn(self, one: ForgetSet, method: UnlearningMethod, **arguments: Any) -> UnlearningResult:
        """A pass; plans that refuse are carried out, and models that the probe calls collapsed are kept."""
        return unlearn(
            self.original, one.rows, method=method, data=self.setting.loader(), seed=self.setting.seed, force=True,
            record=False, probe_samples=self.preset.probe_samples,
            trainer={**QUIET, "accelerator": self.setting.accelerator}, **arguments,
        )  # fmt: skip

    def row(self, one: ForgetSet, twin: LightningModule, result: UnlearningResult, **labels: Any) -> Row:
        """What is measured of a pass."""
        before, after = result.stages[0].probe_before, result.stages[-1].probe_after
        found = {
            "set": one.name, **labels, "seconds": result.seconds, "probe": judge_probe(before, after),
            **self.setting.measure(result.model.cpu(), twin, one),
        }  # fmt: skip
        if (plan := result.plan) is not None:
            found |= {
                "touched": plan.touched_fraction, "share": plan.mean_share, "relative_norm": plan.relative_norm,
                "changed": plan.changed_weights / plan.weights, "damage": plan.damage,
                "specificity": plan.specificity, "refuses": plan.refuses,
            }  # fmt: skip
        return found

    def references(self, one: ForgetSet, twin: LightningModule) -> Iterator[Row]:
        """The untouched and the retrained model."""
        for way, model in (("untouched", self.original), ("retrained", twin)):
            yield {"set": one.name, "way": way, **self.setting.measure(model, twin, one)}


def amnesiac_rows(setting: Setting, preset: Preset) -> list[Row]:
    """Algorithm 1: one recorded training, every fraction of its updates subtracted, own ones and the placebo's."""
    with tempfile.TemporaryDirectory(prefix="gogineni2024-") as folder:
        recorder = DeltaRecorder(f"{folder}/store", 1.0, value_dtype="float32", watch=setting.watched)
        study = _Study(setting, preset, setting.fit(recorder))
        store = DeltaStore.open(f"{folder}/store")
        rows: list[Row] = []
        for one in setting.sets:
            twin = setting.twin(one)
            rows += study.references(one, twin)
            for way, keep, method in _subtractions(preset, setting.seed):
                roles, repairs = [("own", one, None)], [None]
                if "random" not in way:
                    roles.append(("placebo", ForgetSet(one.name, one.placebo, ()), list(one.rows)))
                    repairs.append(FineTune(max_steps=preset.repair_steps))
                for role, asked, control_for in roles:
                    for repair in repairs:
                        result = study.unlearn(asked, method, store=store, then=repair, control_for=control_for)
                        labels = {"way": way, "keep": keep, "role": role, "repaired": repair is not None}
                        rows.append(study.row(one, twin, result, **labels))
            # What the repair does without a subtraction.
            result = study.unlearn(one, FineTune(max_steps=preset.repair_steps))
            rows.append(study.row(one, twin, result, way="repair alone", keep=0.0, role="own", repaired=True))
        return rows


def _subtractions(preset: Preset, seed: int) -> Iterator[tuple[str, float, UnlearningMethod]]:
    yield "amnesiac", 1.0, Amnesiac()
    for way, (prune, criterion) in PRUNES.items():
        for keep in preset.keeps:
            if keep < 1:
                yield way, keep, PartialAmnesiac(keep=keep, prune=prune, criterion=criterion, mask_seed=seed)


def update_rows(setting: Setting, preset: Preset) -> list[Row]:
    """Algorithms 2 and 3: every objective in its naive form, with partial updates, and with a smaller rate instead."""
    study = _Study(setting, preset, setting.fit())
    rows: list[Row] = []
    for one in setting.sets:
        twin = setting.twin(one)
        rows += study.references(one, twin)
        for objective in OBJECTIVES:
            for form, fraction, method in _forms(objective, preset, setting.seed):
                labels = {"objective": objective, "form": form, "fraction": fraction}
                rows.append(study.row(one, twin, study.unlearn(one, method), **labels))
    return rows


def _forms(objective: str, preset: Preset, seed: int) -> Iterator[tuple[str, float, LossMethod]]:
    yield "naive", 1.0, _naive(objective, preset.update_steps, 1.0)
    for fraction in preset.fractions:
        if fraction == 1:
            continue
        # A random mask of a tenth moves weights, on average, as a tenth of the rate does: is a mask better than that?
        yield "smaller rate", fraction, _naive(objective, preset.update_steps, fraction)
        for mask in preset.masks:
            yield mask, fraction, _partial(objective, preset.update_steps, PartialUpdates(fraction, mask, seed=seed))


def _naive(objective: str, steps: int, factor: float) -> LossMethod:
    """`stop=None`: a fixed number of steps, as the paper's naive forms presumably have, and not the package's stop at the held-out loss."""
    scale = LR_SCALES[objective] * factor
    match objective:
        case "gradient ascent":
            return GradientAscent(max_steps=steps, lr_scale=scale, stop=None)
        case "NegGrad+":
            return NegGradPlus(max_steps=steps, lr_scale=scale, stop=None)
        case _:
            return LabelFlipping(
                retain_weight=_retain_weight(objective), max_steps=steps, lr_scale=scale, stop=None, draw="sample"
            )


def _partial(objective: str, steps: int, updates: PartialUpdates) -> LossMethod:
    chosen: dict[str, Any] = {
        "fraction": updates.fraction, "mask": updates.mask, "mask_seed": updates.seed, "max_steps": steps,
        "lr_scale": LR_SCALES[objective], "stop": None,
    }  # fmt: skip
    match objective:
        case "gradient ascent":
            return PartialGradientAscent(**chosen)
        case "NegGrad+":
            return _naive(objective, steps, 1.0).with_updates(updates)
        case _:
            return PartialLabelFlipping(**chosen, retain_weight=_retain_weight(objective), draw="sample")


def _retain_weight(objective: str) -> float:
    """The method's own, or next to nothing: it wants a weight above 0."""
    return LabelFlipping().retain_weight if objective == "label flipping, with retain data" else 1e-9


def storage_rows(setting: Setting, preset: Preset) -> list[Row]:
    """Bytes of a store of every fraction, from the same training recorded anew: all its steps, whoever was in them."""
    rows: list[Row] = []
    for keep in preset.keeps:
        with tempfile.TemporaryDirectory(prefix="gogineni2024-") as folder:
            path = Path(folder) / "store"
            module = setting.fit(DeltaRecorder(path, keep, value_dtype="float32"))
            weights = sum(one.numel() for one in module.parameters())
            info = DeltaStore.open(path).info()
            on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            rows.append(
                {
                    "keep": keep, "bytes": info.bytes, "bytes_on_disk": on_disk, "steps": info.steps,
                    "bytes_per_kept": info.bytes_per_kept, "weights": weights, "model_bytes": 4 * weights,
                    "pruning_error": info.pruning_error,
                }
            )  # fmt: skip
    return rows
