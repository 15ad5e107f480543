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

__all__ = ["LR_SCALES", "OBJECTIVES", "Study", "amnesiac_rows", "storage_rows", "update_rows"]

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
class Study:
    """What all passes of one job share."""

    setting: Setting
    preset: Preset
    original: Classifier

    def unlearn(
        self, asked: ForgetSet, method: UnlearningMethod, model: LightningModule | None = None, **arguments: Any
    ) -> UnlearningResult:
        """A pass; plans that refuse are carried out, and models that the probe calls collapsed are kept."""
        return unlearn(
            self.original if model is None else model, asked.rows, method=method, data=self.setting.loader(),
            seed=self.setting.seed, force=True, record=False, probe_samples=self.preset.probe_samples,
            trainer={**QUIET, "accelerator": self.setting.accelerator}, **arguments,
        )  # fmt: skip

    def repair(self, one: ForgetSet, model: LightningModule | None = None) -> UnlearningResult:
        """The repair as a pass of its own, the same to the bit as `then=` of the pass before.

        Behind a placebo's pass it leaves out the forget set as well, which is what `control_for=` does.
        """
        return self.unlearn(one, FineTune(max_steps=self.preset.repair_steps), model)

    def row(self, one: ForgetSet, twin: LightningModule, *passes: UnlearningResult, **labels: Any) -> Row:
        """What is measured of the model that one pass, or several in turn, have made."""
        before, after = passes[0].stages[0].probe_before, passes[-1].stages[-1].probe_after
        found = {
            "set": one.name, **labels, "seconds": sum(one.seconds for one in passes),
            "probe": judge_probe(before, after), **self.setting.measure(passes[-1].model.cpu(), twin, one),
        }  # fmt: skip
        if (plan := passes[0].plan) is not None:
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
        study = Study(setting, preset, setting.fit(recorder))
        store = DeltaStore.open(f"{folder}/store")
        rows: list[Row] = []
        for one in setting.sets:
            twin = setting.twin(one)
            rows += study.references(one, twin)
            for way, keep, method in _subtractions(preset, setting.seed):
                controlled = "random" not in way
                roles = [("own", one, None)]
                if controlled:
                    roles.append(("placebo", ForgetSet(one.name, one.placebo, ()), list(one.rows)))
                for role, asked, control_for in roles:
                    labels = {"way": way, "keep": keep, "role": role}
                    edited = study.unlearn(asked, method, store=store, control_for=control_for)
                    rows.append(study.row(one, twin, edited, **labels, repaired=False))
                    if controlled:
                        mended = study.repair(one, edited.model)
                        rows.append(study.row(one, twin, edited, mended, **labels, repaired=True))
            # What the repair does without a subtraction.
            alone = study.repair(one)
            rows.append(study.row(one, twin, alone, way="repair alone", keep=0.0, role="own", repaired=True))
        return rows


def _subtractions(preset: Preset, seed: int) -> Iterator[tuple[str, float, UnlearningMethod]]:
    yield "amnesiac", 1.0, Amnesiac()
    for way, (prune, criterion) in PRUNES.items():
        more = preset.control_fractions if criterion == "random" else ()
        for keep in (*preset.keeps, *more):
            if keep < 1:
                yield way, keep, PartialAmnesiac(keep=keep, prune=prune, criterion=criterion, mask_seed=seed)


def update_rows(setting: Setting, preset: Preset) -> list[Row]:
    """Algorithms 2 and 3: every objective in its naive form, with partial updates, and with a smaller rate instead."""
    study = Study(setting, preset, setting.fit())
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
    fractions = [fraction for fraction in preset.fractions if fraction < 1]
    # A random mask of a tenth moves weights, on average, as a tenth of the rate does: is a mask better than that?
    for factor in sorted((*fractions, *preset.control_fractions)):
        yield "smaller rate", factor, _naive(objective, preset.update_steps, factor)
    for mask in preset.masks:
        for fraction in fractions:
            yield mask, fraction, _partial(objective, preset.update_steps, PartialUpdates(fraction, mask, seed=seed))


def _naive(objective: str, steps: int, factor: float) -> LossMethod:
    """`stop=None`: a fixed number of steps, as the paper's naive forms presumably have, and not the package's rule."""
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
