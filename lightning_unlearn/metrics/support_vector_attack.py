"""`SupportVectorAttack`: the membership attack of Unlearn-Sparse and SalUn, as a torchmetrics metric."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_unlearn.functional.classifier_attacks import MemberShares, support_vector_attack
from lightning_unlearn.functional.prediction_scores import ATTACK_FEATURES, AttackFeature, attack_features
from lightning_unlearn.metrics.split_features import SplitFeatures
from lightning_unlearn.types import Split
from lightning_unlearn.utilities.checks import check_choice, check_positive_int

__all__ = ["SupportVectorAttack"]


class SupportVectorAttack(SplitFeatures):
    """Share of the forget set that a support vector classifier of retain against held-out samples takes for members.

    Members are the retain samples, non-members the held-out ones, the larger set sub-sampled to the size of the
    smaller; the classifier is then asked about the forget set. What papers report as "MIA" of this form, mostly with
    the confidence, is :attr:`efficacy`, one minus the share: higher there is lower here. The right value is the
    retrained model's, whose efficacy is not 1 where random samples are forgotten.

    Measured (docs/metrics.md): on clean random samples of small networks it already differs from retraining by
    somewhat more than retrainings differ; small differences are no finding.

    Guarantee: heuristic, one attack and not the strongest; the value depends on the samples, the options and the seed,
    not on the order of batches or processes. Source: Jia et al. 2023, arXiv 2304.04934, and Fan et al. 2024,
    arXiv 2310.12508; see :func:`lightning_unlearn.functional.classifier_attacks.support_vector_attack` for what is put
    right. Features are computed in float64 from logits of any floating dtype, half precision included, kept in the
    metric's dtype (float32 unless `set_dtype(torch.float64)` was called) and fitted in float64; processes may hold any
    splits, or none.

    Args:
        feature: `"correctness"`, `"confidence"` (probability of the true class), `"entropy"`, `"modified_entropy"` or
            `"probabilities"` (of all classes).
        seed: Of the sub-sampling.
        kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an option is not as above.

    >>> import torch
    >>> metric, zeros = SupportVectorAttack(), torch.zeros(20, dtype=torch.long)
    >>> sure, unsure = torch.tensor([[5.0, 0.0]] * 20), torch.tensor([[0.5, 0.0]] * 20)
    >>> metric.update(sure, zeros, split="retain")
    >>> metric.update(unsure, zeros, split="test")
    >>> metric.update(torch.cat([sure[:1], unsure[:3]]), zeros[:4], split="forget")
    >>> metric.compute()["forget_member_share"], metric.efficacy
    (tensor(0.2500, dtype=torch.float64), tensor(0.7500, dtype=torch.float64))
    """

    def __init__(self, *, feature: AttackFeature = "confidence", seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.feature = check_choice("feature", feature, ATTACK_FEATURES)
        self.seed = check_positive_int("seed", seed, zero=True)

    def update(self, logits: Tensor, targets: Tensor, *, split: Split) -> None:
        """Add samples of one split.

        Args:
            logits: (N, C), of the model under attack.
            targets: (N,), integer class numbers.
            split: `"forget"`, `"retain"` (members) or `"test"` (held-out non-members).

        Raises:
            ValueError: the split is another, shapes or class numbers do not fit, or logits are not finite.
        """
        self._add(attack_features(logits.detach(), targets, self.feature), split)

    def forward(self, logits: Tensor, targets: Tensor, *, split: Split) -> dict[str, Tensor]:
        """Add samples of one split and return nothing: one split alone has no result."""
        self.update(logits, targets, split=split)
        return {}

    def _attack(self, *, forget: Tensor, retain: Tensor, test: Tensor) -> MemberShares:
        return support_vector_attack(forget=forget, retain=retain, test=test, seed=self.seed)
