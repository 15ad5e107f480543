"""What attacks with a classifier of retain against held-out samples share: features by split, and the result."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_unlearn.functional.classifier_attacks import MemberShares
from lightning_unlearn.metrics.agreement import AgreeingMetric
from lightning_unlearn.metrics.gathering import gather_uneven
from lightning_unlearn.results import Target
from lightning_unlearn.types import Split
from lightning_unlearn.utilities.checks import check_choice

__all__ = ["SplitFeatures"]

_SPLITS: tuple[Split, ...] = ("forget", "retain", "test")


class SplitFeatures(AgreeingMetric):
    """Features of the samples of three splits, gathered in full, and the shares that an attack takes for members.

    Features are kept in the metric's dtype (float32 unless `set_dtype(torch.float64)` was called). Processes may hold
    any splits, or none.

    Args:
        kwargs: See :class:`torchmetrics.Metric`.
    """

    is_differentiable: bool = False
    higher_is_better: bool = False
    full_state_update: bool = False
    target: ClassVar[Target] = "retrained"

    forget: list[Tensor]
    retain: list[Tensor]
    test: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("dist_sync_fn", gather_uneven)
        super().__init__(**kwargs)
        for split in _SPLITS:
            self.add_state(split, [], dist_reduce_fx="cat")

    @abstractmethod
    def _attack(self, *, forget: Tensor, retain: Tensor, test: Tensor) -> MemberShares:
        """The attack on the features of each split, each (N,) or (N, F)."""

    def _add(self, features: Tensor, split: Split) -> None:
        states = {"forget": self.forget, "retain": self.retain, "test": self.test}
        states[check_choice("split", split, _SPLITS)].append(features.to(self.dtype))

    def _no_value(self) -> Any:
        return {}

    def compute(self) -> dict[str, Tensor]:
        """Shares taken for members, float64 scalars: `forget_member_share`, and of what the attack was trained on.

        Where `retain_member_share` is close to `test_member_share`, the attack cannot tell members from non-members,
        and says nothing of the forget set either.

        Raises:
            ValueError: there are fewer than 10 retain or held-out samples or no sample to forget, or features are not
                finite.
        """
        forget, retain, test = (
            dim_zero_cat(state) if len(state) else torch.empty(0, device=self.device)
            for state in (self.forget, self.retain, self.test)
        )
        shares = self._attack(forget=forget, retain=retain, test=test)
        return {
            f"{split}_member_share": torch.tensor(getattr(shares, split), dtype=torch.float64, device=self.device)
            for split in _SPLITS
        }

    @property
    def efficacy(self) -> Tensor:
        """`1 - forget_member_share`, the "MIA efficacy" of the literature; under several processes all have to ask."""
        return 1 - self.compute()["forget_member_share"]

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one result of `compute` or a list of them; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
