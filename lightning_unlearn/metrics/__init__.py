"""Metrics for unlearning: thin torchmetrics classes over `functional`, one family a file.

Beside `higher_is_better`, every class declares `target`: `"high"`, `"low"`, or `"retrained"` where the right value is
that of a retrained model and not an extreme.
"""

from lightning_unlearn.metrics.divergences import JSToReference, KLToReference
from lightning_unlearn.metrics.entropy_attack import EntropyAttack
from lightning_unlearn.metrics.logistic_attack import LogisticAttack
from lightning_unlearn.metrics.membership import LossThresholdAttack
from lightning_unlearn.metrics.privacy_risk_score import PrivacyRiskScore
from lightning_unlearn.metrics.support_vector_attack import SupportVectorAttack
from lightning_unlearn.metrics.threshold_attack import ThresholdAttack
from lightning_unlearn.metrics.unlearning_error import UnlearningError
from lightning_unlearn.metrics.unlearning_metrics import UnlearningMetrics
from lightning_unlearn.metrics.verification_error import VerificationError

__all__ = [
    "EntropyAttack",
    "JSToReference",
    "KLToReference",
    "LogisticAttack",
    "LossThresholdAttack",
    "PrivacyRiskScore",
    "SupportVectorAttack",
    "ThresholdAttack",
    "UnlearningError",
    "UnlearningMetrics",
    "VerificationError",
]
