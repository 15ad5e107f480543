"""Machine unlearning for PyTorch Lightning: record, plan, unlearn, evaluate, report.

The public names below load on first use, so that `import lightning_unlearn` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_unlearn.__about__ import __version__

if TYPE_CHECKING:
    from lightning_unlearn.api import evaluate, unlearn
    from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
    from lightning_unlearn.callbacks.subject_grouping import SubjectGrouping
    from lightning_unlearn.data.datamodule import UnlearningDataModule
    from lightning_unlearn.data.grouping import SubjectGroupedBatchSampler
    from lightning_unlearn.deltas.ledger import DeletionLedger
    from lightning_unlearn.deltas.placebo import placebo_request
    from lightning_unlearn.deltas.plan import DeletionPlan
    from lightning_unlearn.deltas.request import DeletionRequest
    from lightning_unlearn.methods import Amnesiac, FineTune, PartialAmnesiac, Retrain
    from lightning_unlearn.metrics import UnlearningMetrics, VerificationError
    from lightning_unlearn.modules.unlearning_module import UnlearningModule
    from lightning_unlearn.report import UnlearningReport
    from lightning_unlearn.store.delta_store import DeltaStore

_HOMES = {
    "Amnesiac": "methods",
    "DeletionLedger": "deltas.ledger",
    "DeletionPlan": "deltas.plan",
    "DeletionRequest": "deltas.request",
    "DeltaRecorder": "callbacks.delta_recorder",
    "DeltaStore": "store.delta_store",
    "FineTune": "methods",
    "PartialAmnesiac": "methods",
    "Retrain": "methods",
    "SubjectGroupedBatchSampler": "data.grouping",
    "SubjectGrouping": "callbacks.subject_grouping",
    "UnlearningDataModule": "data.datamodule",
    "UnlearningMetrics": "metrics",
    "UnlearningModule": "modules.unlearning_module",
    "UnlearningReport": "report",
    "VerificationError": "metrics",
    "evaluate": "api",
    "placebo_request": "deltas.placebo",
    "unlearn": "api",
}

__all__ = [
    "Amnesiac",
    "DeletionLedger",
    "DeletionPlan",
    "DeletionRequest",
    "DeltaRecorder",
    "DeltaStore",
    "FineTune",
    "PartialAmnesiac",
    "Retrain",
    "SubjectGroupedBatchSampler",
    "SubjectGrouping",
    "UnlearningDataModule",
    "UnlearningMetrics",
    "UnlearningModule",
    "UnlearningReport",
    "VerificationError",
    "__version__",
    "evaluate",
    "placebo_request",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lightning_unlearn.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
