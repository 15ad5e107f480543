"""`LogisticAttack`: membership inference by logistic regression on the loss, as a torchmetrics metric."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.functional.classifier_attacks import MIN_SAMPLES, logistic_attack
from lightning_unlearn.metrics.member_losses import MemberLosses, split_mask
from lightning_unlearn.types import Split
from lightning_unlearn.utilities.checks import check_positive, check_positive_int

__all__ = ["LogisticAttack"]


class LogisticAttack(MemberLosses):
    """Accuracy of logistic regression that tells the forgotten samples from held-out ones by their loss.

    Mean over stratified splits of the accuracy on the tenth left out, after sub-sampling the larger group to the size
    of the smaller. 0.5 = cannot tell; the right value is the retrained model's. Retain samples are members and are
    refused by name. To forget a class, take held-out samples of that class.

    Measured (docs/metrics.md): nearly or wholly blind to a forgotten class when held-out samples of that class are
    the non-members, since the model answers both alike, before and after. On clean random samples of small networks
    it may already tell the original from a retrained model.

    SCRUB's form is `n_splits=5, clip=100.0`; the default is that of the NeurIPS 2023 challenge's starting kit.

    Guarantee: heuristic, one attack and not the strongest; the value depends on the samples, the options and the seed,
    not on the order of batches or processes. Source: Kurmanji et al. 2023, arXiv 2302.09880, see
    :func:`lightning_unlearn.functional.classifier_attacks.logistic_attack`. Losses are kept in the metric's dtype
    (float32 unless `set_dtype(torch.float64)` was called) and fitted in float64; processes may hold any split, or none.

    Args:
        n_splits: Number of shuffle splits.
        clip: Largest magnitude of a loss; larger ones are taken for this. `None` for no limit.
        seed: Of the sub-sampling and of the splits.
        kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an option is not as above.

    >>> metric = LogisticAttack(n_splits=3)
    >>> metric.update(torch.linspace(0, 1, 20), split="forget")
    >>> metric.update(torch.linspace(3, 4, 30), split="test")
    >>> metric.compute()
    tensor(1., dtype=torch.float64)
    """

    def __init__(self, *, n_splits: int = 10, clip: float | None = None, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(min_samples=MIN_SAMPLES, **kwargs)
        self.n_splits = check_positive_int("n_splits", n_splits)
        self.clip = None if clip is None else check_positive("clip", clip)
        self.seed = check_positive_int("seed", seed, zero=True)

    def update(self, losses: Tensor, *, split: Split) -> None:
        """Add losses of one split.

        Args:
            losses: (N,) per-sample losses of the model under attack, such as those of
                :func:`lightning_unlearn.functional.membership.cross_entropy_per_sample`.
            split: `"forget"` (members) or `"test"` (held-out non-members).

        Raises:
            ValueError: the split is another, `losses` is not a vector, or a loss is NaN.
        """
        self._add(losses, split_mask(losses, split))

    def forward(self, losses: Tensor, *, split: Split) -> Tensor:
        """Add losses of one split and return NaN: one split alone has no accuracy."""
        self.update(losses, split=split)
        return torch.full((), math.nan, dtype=torch.float64, device=self.device)

    def compute(self) -> Tensor:
        """Mean accuracy over the splits, a float64 scalar in [0, 1].

        Raises:
            ValueError: there are fewer than 10 members or non-members, or a loss is infinite and `clip` not given.
        """
        members, nonmembers = self._groups()
        scores = logistic_attack(members, nonmembers, n_splits=self.n_splits, clip=self.clip, seed=self.seed)
        return scores.mean().to(self.device)
