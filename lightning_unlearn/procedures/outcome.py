"""What a forgetting pass returns."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning import LightningModule

from lightning_unlearn.deltas.plan import DeletionPlan
from lightning_unlearn.results import StageResult
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.trainers import idle_trainer

__all__ = ["UnlearningResult", "leftovers_of", "save_checkpoint"]


@dataclass(frozen=True, slots=True)
class UnlearningResult:
    """Outcome of `unlearn`.

    Attributes:
        model: The user's own module, forgotten; or an untouched copy of the original where the pass was rolled back.
        candidate: Where the pass was rolled back, the damaged model, for inspection; else `None`.
        method: Name of the method.
        settings: Its hyper-parameters.
        plan: The plan, `None` without a store.
        entry_id: Entry in the deletion ledger, `None` where nothing was subtracted.
        stages: What was done, in order, with a probe after each stage.
        seconds: Wall time of the pass, probes included.
        notes: Sentences a reader of the numbers should know.
        leftovers: Artefacts that still hold the forgotten data, for somebody to clean up.
    """

    model: LightningModule = field(repr=False)
    candidate: LightningModule | None = field(repr=False)
    method: str
    settings: Mapping[str, Any]
    plan: DeletionPlan | None
    entry_id: str | None
    stages: tuple[StageResult, ...]
    seconds: float
    notes: tuple[str, ...]
    leftovers: tuple[str, ...]

    @property
    def rolled_back(self) -> bool:
        """Whether the original was returned because the probe called the result collapsed."""
        return self.candidate is not None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `model` as an ordinary checkpoint of the user's class; it loads without this package.

        It holds weights, buffers and hyper-parameters and no optimizer state: that state still knows the forgotten
        samples.
        """
        save_checkpoint(self.model, path)


def save_checkpoint(module: LightningModule, path: str | os.PathLike[str]) -> None:
    """Write a weights-only Lightning checkpoint outside any fit; the module's trainer is left as it was."""
    trainer = idle_trainer(module)
    attached = module._trainer
    module.trainer = trainer
    try:
        trainer.save_checkpoint(Path(path), weights_only=True)
    finally:
        module._trainer = attached


def leftovers_of(store: DeltaStore | None, plan: DeletionPlan | None, entry_id: str | None) -> tuple[str, ...]:
    """Name every artefact that still holds the forgotten samples, as far as it can be known from here.

    Args:
        store: What was recorded.
        plan: The plan of the pass.
        entry_id: Its ledger entry, `None` where nothing was subtracted or the pass was taken back.
    """
    found = [
        "optimizer state in checkpoints of the original run (momentum and second moments saw the samples): delete it",
        "weights saved before this pass: checkpoints, exports, EMA or SWA averages, models in registries",
        "the samples themselves, in the dataset, its caches and its backups",
    ]
    if store is not None and plan is not None and len(plan.steps):
        older = [
            state
            for state in store.lineage.states
            if _contains(state.ranges, plan.steps) and entry_id not in state.edits
        ]
        purge = "DeltaStore.purge" if entry_id is None else "DeletionLedger.purge"
        found.insert(
            0,
            f"the store {store.url}: the records of {len(plan.steps)} steps with the samples, and the samples' ids, "
            f"until `{purge}` removes them",
        )
        if older:
            found.insert(1, f"{len(older)} recorded model states (checkpoints) that contain the touched steps")
    return tuple(found)


def _contains(ranges: tuple[tuple[int, int], ...], steps: Any) -> bool:
    return any(bool(((steps >= start) & (steps < stop)).any()) for start, stop in ranges)
