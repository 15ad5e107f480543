"""Metrics for unlearning: thin torchmetrics classes over `functional`, one family a file.

Beside `higher_is_better`, every class declares `target`: `"high"`, `"low"`, or `"retrained"` where the right value is
that of a retrained model and not an extreme.
"""

from lightning_unlearn.metrics.divergences import JSToReference, KLToReference
from lightning_unlearn.metrics.forgetting_score import ForgettingScore
from lightning_unlearn.metrics.klom import KLOM
from lightning_unlearn.metrics.membership import LossThresholdAttack
from lightning_unlearn.metrics.privacy_risk_score import PrivacyRiskScore
from lightning_unlearn.metrics.u_lira import ULiRA
from lightning_unlearn.metrics.unlearning_error import UnlearningError
from lightning_unlearn.metrics.unlearning_metrics import UnlearningMetrics
from lightning_unlearn.metrics.verification_error import VerificationError

__all__ = [
    "KLOM",
    "ForgettingScore",
    "JSToReference",
    "KLToReference",
    "LossThresholdAttack",
    "PrivacyRiskScore",
    "ULiRA",
    "UnlearningError",
    "UnlearningMetrics",
    "VerificationError",
]
