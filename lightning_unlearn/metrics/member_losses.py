"""What attacks on the forget set against held-out samples share: whose losses are whose, and when there are enough."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_unlearn.metrics.agreement import AgreeingMetric
from lightning_unlearn.metrics.gathering import gather_uneven
from lightning_unlearn.results import Target
from lightning_unlearn.types import Split
from lightning_unlearn.utilities.checks import check_positive_int, expected

__all__ = ["MemberLosses", "split_mask"]


def split_mask(losses: Tensor, split: Split) -> Tensor:
    """Which of the samples of one split are members: all of `"forget"`, none of `"test"`.

    Raises:
        ValueError: the split is another; `"retain"` with the reason why.

    >>> split_mask(torch.zeros(2), "forget")
    tensor([True, True])
    """
    rule = "'forget' (members) or 'test' (held-out non-members)"
    if split == "retain":
        remedy = "The model was trained on retain samples, so they cannot stand for non-members."
        raise ValueError(expected("split", rule, split, remedy))
    if split not in ("forget", "test"):
        raise ValueError(expected("split", rule, split))
    return torch.full_like(losses, split == "forget", dtype=torch.bool)


class MemberLosses(AgreeingMetric):
    """Losses of members and of non-members, gathered in full: the states of an attack on them.

    Losses, or other scores that are smaller for members, are kept in the metric's dtype (float32 unless
    `set_dtype(torch.float64)` was called). Processes may hold either kind, both or none.

    Args:
        min_samples: Fewest members and fewest non-members that a result is given for.
        kwargs: See :class:`torchmetrics.Metric`.
    """

    is_differentiable: bool = False
    higher_is_better: bool = False
    full_state_update: bool = False
    target: ClassVar[Target] = "retrained"

    member_losses: list[Tensor]
    nonmember_losses: list[Tensor]

    def __init__(self, *, min_samples: int, **kwargs: Any) -> None:
        kwargs.setdefault("dist_sync_fn", gather_uneven)
        super().__init__(**kwargs)
        self.min_samples = check_positive_int("min_samples", min_samples)
        self.add_state("member_losses", [], dist_reduce_fx="cat")
        self.add_state("nonmember_losses", [], dist_reduce_fx="cat")

    def _add(self, losses: Tensor, is_member: Tensor | None) -> None:
        if losses.ndim != 1 or losses.isnan().any():
            raise ValueError(expected("losses", "a vector without NaN", tuple(losses.shape), "Pass one loss a sample."))
        if is_member is None or is_member.shape != losses.shape or is_member.dtype != torch.bool:
            raise ValueError(expected("is_member", f"a bool vector of {losses.numel()} entries", is_member))
        kept = losses.detach().to(self.dtype)
        self.member_losses.append(kept[is_member])
        self.nonmember_losses.append(kept[~is_member])

    def _groups(self) -> tuple[Tensor, Tensor]:
        """Losses of all members and of all non-members, if there are enough."""
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
        return members, nonmembers

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one result of `compute` or a list of them; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
