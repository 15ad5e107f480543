"""`LossThresholdAttack`: membership inference by the loss, as a torchmetrics metric."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_unlearn.functional.membership import (
    membership_accuracy,
    membership_auroc,
    membership_auroc_error,
    membership_tpr_at_fpr,
)
from lightning_unlearn.results import Target
from lightning_unlearn.types import Split
from lightning_unlearn.utilities.checks import check_positive_int, expected

__all__ = ["LossThresholdAttack"]


def _attack(members: Tensor, nonmembers: Tensor) -> dict[str, Tensor]:
    auroc = membership_auroc(members, nonmembers)
    error = membership_auroc_error(float(auroc), members.numel(), nonmembers.numel())
    return {
        "membership_auroc": auroc,
        "membership_auroc_error": torch.tensor(error, dtype=torch.float64, device=auroc.device),
        "membership_tpr_at_1e-2_fpr": membership_tpr_at_fpr(members, nonmembers, 0.01),
        "membership_tpr_at_1e-3_fpr": membership_tpr_at_fpr(members, nonmembers, 0.001),
        "membership_accuracy": membership_accuracy(members, nonmembers),
    }


class LossThresholdAttack(Metric):
    """How well a threshold on the loss tells the forgotten samples from samples the model never saw.

    Positive class = member (trained on), score = minus the loss. Members are the samples of the forget set,
    non-members *held-out* samples. Retain samples are members too: taking them for non-members is the commonest way to
    get a wrong number here, so the split `"retain"` is refused. The right values are the retrained model's, not
    an extreme: 0.5 only where the forgotten samples are distributed as the held-out ones are.

    Losses are kept in the metric's dtype (float32 unless `set_dtype(torch.float64)` was called) and in full.

    Args:
        min_samples: Fewest members and fewest non-members that a result is given for. With 20 members the standard
            error of the AUROC is about 0.07.
        kwargs: See :class:`torchmetrics.Metric`.

    >>> metric = LossThresholdAttack(min_samples=2)
    >>> metric.update(torch.tensor([0.1, 0.2, 0.9]), split="forget")
    >>> metric.update(torch.tensor([0.2, 1.0]), split="test")
    >>> metric.compute()["membership_auroc"]
    tensor(0.7500, dtype=torch.float64)
    """

    is_differentiable: bool = False
    higher_is_better: bool = False
    full_state_update: bool = False
    target: ClassVar[Target] = "retrained"

    member_losses: list[Tensor]
    nonmember_losses: list[Tensor]

    def __init__(self, *, min_samples: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.min_samples = check_positive_int("min_samples", min_samples)
        self.add_state("member_losses", [], dist_reduce_fx="cat")
        self.add_state("nonmember_losses", [], dist_reduce_fx="cat")

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
        if losses.ndim != 1 or losses.isnan().any():
            raise ValueError(expected("losses", "a vector without NaN", tuple(losses.shape), "Pass one loss a sample."))
        if split == "retain":
            raise ValueError(
                expected(
                    "split",
                    "'forget' (members) or 'test' (held-out non-members)",
                    split,
                    "The model was trained on retain samples, so they cannot stand for non-members.",
                )
            )
        if split is not None:
            if split not in ("forget", "test"):
                raise ValueError(expected("split", "'forget' (members) or 'test' (held-out non-members)", split))
            is_member = torch.full_like(losses, split == "forget", dtype=torch.bool)
        if is_member is None or is_member.shape != losses.shape or is_member.dtype != torch.bool:
            raise ValueError(expected("is_member", f"a bool vector of {losses.numel()} entries", is_member))
        kept = losses.detach().to(self.dtype)
        self.member_losses.append(kept[is_member])
        self.nonmember_losses.append(kept[~is_member])

    def forward(
        self, losses: Tensor, is_member: Tensor | None = None, *, split: Split | None = None
    ) -> dict[str, Tensor]:
        """Add losses and return the result of this batch alone, empty where it has too few of one kind for one."""
        self.update(losses, is_member, split=split)
        members, nonmembers = self.member_losses[-1], self.nonmember_losses[-1]
        enough = min(members.numel(), nonmembers.numel()) >= self.min_samples
        return _attack(members, nonmembers) if enough else {}

    def compute(self) -> dict[str, Tensor]:
        """AUROC with its standard error, share of members found at 1 % and 0.1 % false alarms, balanced accuracy.

        Raises:
            ValueError: there are fewer than `min_samples` members or non-members.
        """
        members, nonmembers = (
            dim_zero_cat(losses) if len(losses) else torch.empty(0, device=self.device)
            for losses in (self.member_losses, self.nonmember_losses)
        )
        counts = {"forget (members)": members.numel(), "test (non-members)": nonmembers.numel()}
        if min(counts.values()) < self.min_samples:
            raise ValueError(
                expected(
                    "losses",
                    f"from at least {self.min_samples} members and {self.min_samples} held-out non-members",
                    counts,
                    "Add samples; with this few an attack shows nothing.",
                )
            )
        return _attack(members, nonmembers)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one result of `compute` or a list of them; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
