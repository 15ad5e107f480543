"""`PrivacyRiskScore`: the privacy risk score of Song and Mittal, as a torchmetrics metric."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_unlearn.functional.prediction_scores import modified_entropy
from lightning_unlearn.functional.privacy_risk import privacy_risk_score
from lightning_unlearn.metrics.agreement import AgreeingMetric
from lightning_unlearn.metrics.gathering import gather_uneven
from lightning_unlearn.results import Target
from lightning_unlearn.utilities.checks import check_choice, check_positive, check_positive_int, expected

__all__ = ["PrivacyRiskScore"]

RiskGroup: TypeAlias = Literal["target", "shadow_member", "shadow_nonmember"]

_GROUPS: tuple[RiskGroup, ...] = ("target", "shadow_member", "shadow_nonmember")


class PrivacyRiskScore(AgreeingMetric):
    """Mean estimated probability that the samples in question were members of a model's training data.

    Three groups of samples: `"target"`, the samples in question (usually the forget set) under the model under attack;
    `"shadow_member"` and `"shadow_nonmember"`, samples that a shadow model was trained on and samples that it never
    saw, both under the *shadow* model. That model is trained as the original one was, on data that hold none of the
    target samples. From its scores the posterior is read, by class and bin of the modified entropy.

    The right value is the retrained model's: 0.5 where the shadow sets cannot be told apart at all, and below it the
    better they can. Compare models with the same shadow sets.

    Guarantee: heuristic, one attack and not the strongest. Source: Song and Mittal 2021, arXiv 2003.10595; see
    :func:`lightning_unlearn.functional.privacy_risk.privacy_risk_score`. Scores are kept in the metric's dtype
    (float32 unless `set_dtype(torch.float64)` was called); processes may hold any groups, or none.

    Measured (docs/metrics.md): on clean random samples of small networks it already tells the original from a
    retrained model, by a few times what retrainings differ; such networks fit their training samples a little
    better.

    Args:
        n_bins: Bins a class.
        log_bins: Equal widths on a logarithmic scale.
        floor: Smaller modified entropies are taken for this with `log_bins`.
        kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an option is not a positive number.

    >>> metric = PrivacyRiskScore()
    >>> sure, unsure = torch.tensor([[9.0, 0.0]] * 3), torch.tensor([[1.0, 0.0]] * 3)
    >>> targets = torch.zeros(3, dtype=torch.long)
    >>> metric.update(torch.cat([sure, unsure]), torch.cat([targets, targets]), group="shadow_nonmember")
    >>> metric.update(sure, targets, group="shadow_member")
    >>> metric.update(sure, targets, group="target")
    >>> metric.compute()
    tensor(0.6667, dtype=torch.float64)
    """

    is_differentiable: bool = False
    higher_is_better: bool = False
    full_state_update: bool = False
    target: ClassVar[Target] = "retrained"

    scores: list[Tensor]
    labels: list[Tensor]
    groups: list[Tensor]

    def __init__(self, *, n_bins: int = 5, log_bins: bool = True, floor: float = 1e-10, **kwargs: Any) -> None:
        kwargs.setdefault("dist_sync_fn", gather_uneven)
        super().__init__(**kwargs)
        self.n_bins = check_positive_int("n_bins", n_bins)
        self.log_bins = bool(log_bins)
        self.floor = check_positive("floor", floor)
        for state in ("scores", "labels", "groups"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, targets: Tensor, *, group: RiskGroup) -> None:
        """Add samples of one group.

        Args:
            logits: (N, C), of the model under attack for `"target"`, else of the shadow model.
            targets: (N,), integer class numbers.
            group: `"target"`, `"shadow_member"` or `"shadow_nonmember"`.

        Raises:
            ValueError: the group is another, shapes or class numbers do not fit, or a logit or the modified entropy is
                not finite.
        """
        check_choice("group", group, _GROUPS)
        scores = modified_entropy(logits.detach(), targets).to(self.dtype)
        if not scores.isfinite().all():
            remedy = "Do not exclude classes that can be true."
            raise ValueError(expected("logits", "such that the modified entropy is finite", "infinite ones", remedy))
        self.scores.append(scores)
        self.labels.append(targets.long())
        self.groups.append(torch.full_like(targets, _GROUPS.index(group), dtype=torch.long))

    def forward(self, logits: Tensor, targets: Tensor, *, group: RiskGroup) -> Tensor:
        """Add samples of one group and return NaN: one group alone has no score."""
        self.update(logits, targets, group=group)
        return torch.full((), math.nan, dtype=torch.float64, device=self.device)

    def _posterior(self) -> Tensor:
        scores, labels, groups = (
            dim_zero_cat(state) if len(state) else torch.empty(0, device=self.device)
            for state in (self.scores, self.labels, self.groups)
        )
        # `set_dtype` converts every state; class numbers and groups come back here.
        labels, groups = labels.long(), groups.long()
        masks = [groups == position for position in range(len(_GROUPS))]
        counts = {group: int(mask.sum()) for group, mask in zip(_GROUPS, masks, strict=True)}
        if not all(counts.values()):
            raise ValueError(expected("samples", "of all three groups", counts, "Call `update` with each `group`."))
        columns = [column for mask in masks for column in (scores[mask], labels[mask])]
        return privacy_risk_score(*columns, n_bins=self.n_bins, log_bins=self.log_bins, floor=self.floor)

    def compute(self) -> Tensor:
        """Mean score over the target samples, a float64 scalar in [0, 1].

        Raises:
            ValueError: a group is empty, or a class among the target samples is missing from a shadow group.
        """
        return self._posterior().mean()

    def compute_per_sample(self) -> Tensor:
        """Score of every target sample in the order they were added, (N,) in float64.

        Under several processes all of them have to call it; the samples of the first process come first.

        Raises:
            ValueError: as for :meth:`compute`.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return self._posterior()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
