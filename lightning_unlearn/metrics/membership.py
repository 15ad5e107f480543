"""`LossThresholdAttack`: membership inference by the loss, as a torchmetrics metric."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_unlearn.functional.membership import threshold_attack
from lightning_unlearn.metrics.member_losses import MemberLosses, split_mask
from lightning_unlearn.types import Split
from lightning_unlearn.utilities.checks import expected

__all__ = ["LossThresholdAttack"]


class LossThresholdAttack(MemberLosses):
    """How well a threshold on the loss tells the forgotten samples from samples the model never saw.

    Positive class = member (trained on), score = minus the loss. Members are the samples of the forget set,
    non-members *held-out* samples. Retain samples are members too: taking them for non-members is the commonest way to
    get a wrong number here, so the split `"retain"` is refused. The right values are the retrained model's, not
    an extreme: 0.5 only where the forgotten samples are distributed as the held-out ones are.

    Measured (docs/metrics.md): nearly or wholly blind to a forgotten class when held-out samples of that class are
    the non-members, since the model answers both alike, before and after. On clean random samples of small networks
    it may already tell the original from a retrained model.

    Losses are kept in the metric's dtype (float32 unless `set_dtype(torch.float64)` was called) and in full.
    :class:`lightning_unlearn.metrics.ThresholdAttack` takes logits in place of losses, and has other scores.

    Args:
        min_samples: Fewest members and fewest non-members that a result is given for. With 20 members the standard
            error of the AUROC is about 0.07.
        kwargs: See :class:`torchmetrics.Metric`.

    >>> import torch
    >>> metric = LossThresholdAttack(min_samples=2)
    >>> metric.update(torch.tensor([0.1, 0.2, 0.9]), split="forget")
    >>> metric.update(torch.tensor([0.2, 1.0]), split="test")
    >>> metric.compute()["membership_auroc"]
    tensor(0.7500, dtype=torch.float64)
    """

    def __init__(self, *, min_samples: int = 10, **kwargs: Any) -> None:
        super().__init__(min_samples=min_samples, **kwargs)

    def update(self, losses: Tensor, is_member: Tensor | None = None, *, split: Split | None = None) -> None:
        """Add losses, and say whose they are in exactly one of two ways.

        Args:
            losses: (N,) per-sample losses of the model under attack, of any monotone kind, such as those of
                :func:`lightning_unlearn.functional.membership.cross_entropy_per_sample`.
            is_member: (N,) bool, true where the original model was trained on the sample.
            split: `"forget"` (all members) or `"test"` (all non-members).

        Raises:
            ValueError: neither or both are given, the split is not one of the two, shapes differ or a loss is NaN.
        """
        if (is_member is None) == (split is None):
            raise ValueError(
                expected(
                    "is_member or split", "given, exactly one of the two", {"is_member": is_member, "split": split}
                )
            )
        self._add(losses, is_member if split is None else split_mask(losses, split))

    def forward(
        self, losses: Tensor, is_member: Tensor | None = None, *, split: Split | None = None
    ) -> dict[str, Tensor]:
        """Add losses and return the result of this batch alone, empty where it has too few of one kind for one."""
        self.update(losses, is_member, split=split)
        members, nonmembers = self.member_losses[-1], self.nonmember_losses[-1]
        enough = min(members.numel(), nonmembers.numel()) >= self.min_samples
        return threshold_attack(members, nonmembers) if enough else {}

    def _no_value(self) -> Any:
        return {}

    def compute(self) -> dict[str, Tensor]:
        """AUROC with its standard error, share of members found at 1 % and 0.1 % false alarms, balanced accuracy.

        Raises:
            ValueError: there are fewer than `min_samples` members or non-members.
        """
        return threshold_attack(*self._groups())
