"""Machine unlearning for PyTorch Lightning: record, plan, unlearn, evaluate, report.

All that a script needs is here: the calls, the callbacks, every registered method, and what is given to them. What it
takes to write a method of one's own is in `lightning_unlearn.methods`. The names load on first use, so that `import
lightning_unlearn` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_unlearn.__about__ import __version__

if TYPE_CHECKING:
    from lightning_unlearn.api import evaluate, unlearn
    from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
    from lightning_unlearn.callbacks.lockstep import Lockstep
    from lightning_unlearn.callbacks.penalty import divided_every
    from lightning_unlearn.callbacks.signals_at_batch_end import SignalsAtBatchEnd
    from lightning_unlearn.callbacks.standard_deviation_penalty import StandardDeviationPenalty
    from lightning_unlearn.callbacks.subject_grouping import SubjectGrouping
    from lightning_unlearn.callbacks.unlearning_error_monitor import UnlearningErrorMonitor
    from lightning_unlearn.callbacks.weight_change_penalty import WeightChangePenalty
    from lightning_unlearn.data.datamodule import UnlearningDataModule
    from lightning_unlearn.data.grouping import SubjectGroupedBatchSampler
    from lightning_unlearn.data.padding import own_samples
    from lightning_unlearn.deltas.in_place import subtract_plan
    from lightning_unlearn.deltas.judgement import PlanThresholds
    from lightning_unlearn.deltas.ledger import DeletionLedger
    from lightning_unlearn.deltas.placebo import placebo_request
    from lightning_unlearn.deltas.plan import DeletionPlan
    from lightning_unlearn.deltas.request import DeletionRequest
    from lightning_unlearn.functional.intervals import paired_bootstrap, student_interval
    from lightning_unlearn.functional.pruning import Pruning
    from lightning_unlearn.functional.score_gaps import SplitScores, average_gap, tug_of_war, tug_of_war_membership
    from lightning_unlearn.methods import (
        Amnesiac,
        BadTeacher,
        BoundaryExpanding,
        BoundaryShrink,
        CatastrophicForgettingK,
        CEFineTune,
        DeltaGrad,
        ExactUnlearningK,
        FineTune,
        FisherForgetting,
        GradientAscent,
        ICEFineTune,
        InfluenceUnlearning,
        KLFineTune,
        L1Sparse,
        LabelFlipping,
        NegGradPlus,
        PartialAmnesiac,
        PartialGradientAscent,
        PartialLabelFlipping,
        PartialUpdates,
        RetentionMasking,
        Retrain,
        Rewind,
        SalUn,
        Scrub,
        ScrubR,
        SelectiveSynapticDampening,
        SingleGradient,
        Sisa,
        SisaEnsemble,
        UnrolledInfluence,
        Unsir,
        plan_rewind,
    )
    from lightning_unlearn.metrics import (
        KLOM,
        ActivationDistance,
        AverageGap,
        BiasRemovalError,
        DecisionRegionChange,
        EntropyAttack,
        ForgettingScore,
        InterclassConfusion,
        JSToReference,
        KLToReference,
        LogisticAttack,
        LossThresholdAttack,
        PrivacyRiskScore,
        SupportVectorAttack,
        ThresholdAttack,
        TugOfWar,
        ULiRA,
        UnlearningError,
        UnlearningMetrics,
        VerificationError,
        ZeroRetrainForgetting,
    )
    from lightning_unlearn.modules.unlearning_module import UnlearningModule
    from lightning_unlearn.procedures.compare import compare_models
    from lightning_unlearn.procedures.guards import ProbeThresholds
    from lightning_unlearn.procedures.outcome import UnlearningResult
    from lightning_unlearn.procedures.relearn import relearn_time
    from lightning_unlearn.procedures.relearn_result import RelearnResult, RelearnSetting
    from lightning_unlearn.procedures.sisa import SisaTraining
    from lightning_unlearn.procedures.train_many import train_many
    from lightning_unlearn.procedures.trained_members import TrainedMembers
    from lightning_unlearn.procedures.twin import Twins, train_twins
    from lightning_unlearn.report import UnlearningReport, plot_decision_regions
    from lightning_unlearn.results import EvaluationResult, NoiseFloor
    from lightning_unlearn.shards.manifest import SisaPlan
    from lightning_unlearn.store.delta_store import DeltaStore
    from lightning_unlearn.tuning import Objective, TuningResult, plot_pareto, tune
    from lightning_unlearn.utilities.batch_adapter import BatchAdapter, as_batch_adapter
    from lightning_unlearn.utilities.checkpoints import load_weights
    from lightning_unlearn.utilities.costs import measure_cost

_HOMES = {
    "ActivationDistance": "metrics",
    "Amnesiac": "methods",
    "AverageGap": "metrics",
    "BadTeacher": "methods",
    "BatchAdapter": "utilities.batch_adapter",
    "BiasRemovalError": "metrics",
    "BoundaryExpanding": "methods",
    "BoundaryShrink": "methods",
    "CEFineTune": "methods",
    "CatastrophicForgettingK": "methods",
    "DecisionRegionChange": "metrics",
    "DeletionLedger": "deltas.ledger",
    "DeletionPlan": "deltas.plan",
    "DeletionRequest": "deltas.request",
    "DeltaGrad": "methods",
    "DeltaRecorder": "callbacks.delta_recorder",
    "DeltaStore": "store.delta_store",
    "EntropyAttack": "metrics",
    "EvaluationResult": "results",
    "ExactUnlearningK": "methods",
    "FineTune": "methods",
    "FisherForgetting": "methods",
    "ForgettingScore": "metrics",
    "GradientAscent": "methods",
    "ICEFineTune": "methods",
    "InfluenceUnlearning": "methods",
    "InterclassConfusion": "metrics",
    "JSToReference": "metrics",
    "KLFineTune": "methods",
    "KLOM": "metrics",
    "KLToReference": "metrics",
    "L1Sparse": "methods",
    "LabelFlipping": "methods",
    "Lockstep": "callbacks.lockstep",
    "LogisticAttack": "metrics",
    "LossThresholdAttack": "metrics",
    "NegGradPlus": "methods",
    "NoiseFloor": "results",
    "Objective": "tuning",
    "PartialAmnesiac": "methods",
    "PartialGradientAscent": "methods",
    "PartialLabelFlipping": "methods",
    "PartialUpdates": "methods",
    "PlanThresholds": "deltas.judgement",
    "PrivacyRiskScore": "metrics",
    "ProbeThresholds": "procedures.guards",
    "Pruning": "functional.pruning",
    "RelearnResult": "procedures.relearn_result",
    "RelearnSetting": "procedures.relearn_result",
    "RetentionMasking": "methods",
    "Retrain": "methods",
    "Rewind": "methods",
    "SalUn": "methods",
    "Scrub": "methods",
    "ScrubR": "methods",
    "SelectiveSynapticDampening": "methods",
    "SignalsAtBatchEnd": "callbacks.signals_at_batch_end",
    "SingleGradient": "methods",
    "Sisa": "methods",
    "SisaEnsemble": "methods",
    "SisaPlan": "shards.manifest",
    "SisaTraining": "procedures.sisa",
    "SplitScores": "functional.score_gaps",
    "StandardDeviationPenalty": "callbacks.standard_deviation_penalty",
    "SubjectGroupedBatchSampler": "data.grouping",
    "SubjectGrouping": "callbacks.subject_grouping",
    "SupportVectorAttack": "metrics",
    "ThresholdAttack": "metrics",
    "TrainedMembers": "procedures.trained_members",
    "TugOfWar": "metrics",
    "TuningResult": "tuning",
    "Twins": "procedures.twin",
    "ULiRA": "metrics",
    "UnlearningDataModule": "data.datamodule",
    "UnlearningError": "metrics",
    "UnlearningErrorMonitor": "callbacks.unlearning_error_monitor",
    "UnlearningMetrics": "metrics",
    "UnlearningModule": "modules.unlearning_module",
    "UnlearningReport": "report",
    "UnlearningResult": "procedures.outcome",
    "UnrolledInfluence": "methods",
    "Unsir": "methods",
    "VerificationError": "metrics",
    "WeightChangePenalty": "callbacks.weight_change_penalty",
    "ZeroRetrainForgetting": "metrics",
    "as_batch_adapter": "utilities.batch_adapter",
    "average_gap": "functional.score_gaps",
    "compare_models": "procedures.compare",
    "divided_every": "callbacks.penalty",
    "evaluate": "api",
    "load_weights": "utilities.checkpoints",
    "measure_cost": "utilities.costs",
    "own_samples": "data.padding",
    "paired_bootstrap": "functional.intervals",
    "placebo_request": "deltas.placebo",
    "plan_rewind": "methods",
    "plot_decision_regions": "report",
    "plot_pareto": "tuning",
    "relearn_time": "procedures.relearn",
    "student_interval": "functional.intervals",
    "subtract_plan": "deltas.in_place",
    "train_many": "procedures.train_many",
    "train_twins": "procedures.twin",
    "tug_of_war": "functional.score_gaps",
    "tug_of_war_membership": "functional.score_gaps",
    "tune": "tuning",
    "unlearn": "api",
}

__all__ = [
    "KLOM",
    "ActivationDistance",
    "Amnesiac",
    "AverageGap",
    "BadTeacher",
    "BatchAdapter",
    "BiasRemovalError",
    "BoundaryExpanding",
    "BoundaryShrink",
    "CEFineTune",
    "CatastrophicForgettingK",
    "DecisionRegionChange",
    "DeletionLedger",
    "DeletionPlan",
    "DeletionRequest",
    "DeltaGrad",
    "DeltaRecorder",
    "DeltaStore",
    "EntropyAttack",
    "EvaluationResult",
    "ExactUnlearningK",
    "FineTune",
    "FisherForgetting",
    "ForgettingScore",
    "GradientAscent",
    "ICEFineTune",
    "InfluenceUnlearning",
    "InterclassConfusion",
    "JSToReference",
    "KLFineTune",
    "KLToReference",
    "L1Sparse",
    "LabelFlipping",
    "Lockstep",
    "LogisticAttack",
    "LossThresholdAttack",
    "NegGradPlus",
    "NoiseFloor",
    "Objective",
    "PartialAmnesiac",
    "PartialGradientAscent",
    "PartialLabelFlipping",
    "PartialUpdates",
    "PlanThresholds",
    "PrivacyRiskScore",
    "ProbeThresholds",
    "Pruning",
    "RelearnResult",
    "RelearnSetting",
    "RetentionMasking",
    "Retrain",
    "Rewind",
    "SalUn",
    "Scrub",
    "ScrubR",
    "SelectiveSynapticDampening",
    "SignalsAtBatchEnd",
    "SingleGradient",
    "Sisa",
    "SisaEnsemble",
    "SisaPlan",
    "SisaTraining",
    "SplitScores",
    "StandardDeviationPenalty",
    "SubjectGroupedBatchSampler",
    "SubjectGrouping",
    "SupportVectorAttack",
    "ThresholdAttack",
    "TrainedMembers",
    "TugOfWar",
    "TuningResult",
    "Twins",
    "ULiRA",
    "UnlearningDataModule",
    "UnlearningError",
    "UnlearningErrorMonitor",
    "UnlearningMetrics",
    "UnlearningModule",
    "UnlearningReport",
    "UnlearningResult",
    "UnrolledInfluence",
    "Unsir",
    "VerificationError",
    "WeightChangePenalty",
    "ZeroRetrainForgetting",
    "__version__",
    "as_batch_adapter",
    "average_gap",
    "compare_models",
    "divided_every",
    "evaluate",
    "load_weights",
    "measure_cost",
    "own_samples",
    "paired_bootstrap",
    "placebo_request",
    "plan_rewind",
    "plot_decision_regions",
    "plot_pareto",
    "relearn_time",
    "student_interval",
    "subtract_plan",
    "train_many",
    "train_twins",
    "tug_of_war",
    "tug_of_war_membership",
    "tune",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lightning_unlearn.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
