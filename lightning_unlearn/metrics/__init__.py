"""Metrics for unlearning: thin torchmetrics classes over `functional`, one family a file.

Beside `higher_is_better`, every class declares `target`: `"high"`, `"low"`, or `"retrained"` where the right value is
that of a retrained model and not an extreme.
"""

from lightning_unlearn.metrics.activation_distance import ActivationDistance
from lightning_unlearn.metrics.average_gap import AverageGap
from lightning_unlearn.metrics.bias_removal_error import BiasRemovalError
from lightning_unlearn.metrics.decision_region_change import DecisionRegionChange
from lightning_unlearn.metrics.divergences import JSToReference, KLToReference
from lightning_unlearn.metrics.entropy_attack import EntropyAttack
from lightning_unlearn.metrics.forgetting_score import ForgettingScore
from lightning_unlearn.metrics.interclass_confusion import InterclassConfusion
from lightning_unlearn.metrics.klom import KLOM
from lightning_unlearn.metrics.logistic_attack import LogisticAttack
from lightning_unlearn.metrics.membership import LossThresholdAttack
from lightning_unlearn.metrics.privacy_risk_score import PrivacyRiskScore
from lightning_unlearn.metrics.support_vector_attack import SupportVectorAttack
from lightning_unlearn.metrics.threshold_attack import ThresholdAttack
from lightning_unlearn.metrics.tug_of_war import TugOfWar
from lightning_unlearn.metrics.u_lira import ULiRA
from lightning_unlearn.metrics.unlearning_error import UnlearningError
from lightning_unlearn.metrics.unlearning_metrics import UnlearningMetrics
from lightning_unlearn.metrics.verification_error import VerificationError
from lightning_unlearn.metrics.zero_retrain_forgetting import ZeroRetrainForgetting

__all__ = [
    "KLOM",
    "ActivationDistance",
    "AverageGap",
    "BiasRemovalError",
    "DecisionRegionChange",
    "EntropyAttack",
    "ForgettingScore",
    "InterclassConfusion",
    "JSToReference",
    "KLToReference",
    "LogisticAttack",
    "LossThresholdAttack",
    "PrivacyRiskScore",
    "SupportVectorAttack",
    "ThresholdAttack",
    "TugOfWar",
    "ULiRA",
    "UnlearningError",
    "UnlearningMetrics",
    "VerificationError",
    "ZeroRetrainForgetting",
]
