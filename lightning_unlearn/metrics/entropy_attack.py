"""`EntropyAttack`: the membership attack of Bad-Teacher and SSD, as a torchmetrics metric."""

from __future__ import annotations

from torch import Tensor

from lightning_unlearn.functional.classifier_attacks import MemberShares, entropy_attack
from lightning_unlearn.functional.prediction_scores import prediction_entropy
from lightning_unlearn.metrics.split_features import SplitFeatures
from lightning_unlearn.types import Split

__all__ = ["EntropyAttack"]


class EntropyAttack(SplitFeatures):
    """Share of the forget set that logistic regression of retain against held-out entropies takes for members.

    Balanced by weights, on all samples, without any randomness. The right value is the retrained model's, and not 0: a
    share far below it is as suspect as one far above.

    Guarantee: heuristic, one attack and not the strongest, and one that knows no label; the value depends on the
    samples alone. Source: Foster et al. 2024, arXiv 2308.07707, after Chundawat et al. 2023, arXiv 2205.08096; see
    :func:`lightning_unlearn.functional.classifier_attacks.entropy_attack`. Entropies are computed in float64 from
    logits of any floating dtype, half precision included, kept in the metric's dtype (float32 unless
    `set_dtype(torch.float64)` was called) and fitted in float64; processes may hold any splits, or none.

    Args:
        kwargs: See :class:`torchmetrics.Metric`.

    >>> import torch
    >>> metric = EntropyAttack()
    >>> sure, unsure = torch.tensor([[5.0, 0.0]] * 20), torch.tensor([[0.5, 0.0]] * 20)
    >>> metric.update(sure, split="retain")
    >>> metric.update(unsure, split="test")
    >>> metric.update(torch.cat([sure[:1], unsure[:3]]), split="forget")
    >>> metric.compute()["forget_member_share"]
    tensor(0.2500, dtype=torch.float64)
    """

    def update(self, logits: Tensor, *, split: Split) -> None:
        """Add samples of one split.

        Args:
            logits: (N, C), of the model under attack.
            split: `"forget"`, `"retain"` (members) or `"test"` (held-out non-members).

        Raises:
            ValueError: the split is another, or `logits` is not a matrix of finite numbers.
        """
        self._add(prediction_entropy(logits.detach()), split)

    def forward(self, logits: Tensor, *, split: Split) -> dict[str, Tensor]:
        """Add samples of one split and return nothing: one split alone has no result."""
        self.update(logits, split=split)
        return {}

    def _attack(self, *, forget: Tensor, retain: Tensor, test: Tensor) -> MemberShares:
        return entropy_attack(forget=forget, retain=retain, test=test)
