"""`ThresholdAttack`: membership inference by one of four scores of a prediction, as a torchmetrics metric."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_unlearn.functional.membership import threshold_attack
from lightning_unlearn.functional.prediction_scores import MEMBERSHIP_SCORES, MembershipScore, membership_score
from lightning_unlearn.metrics.member_losses import MemberLosses, split_mask
from lightning_unlearn.types import Split
from lightning_unlearn.utilities.checks import check_choice

__all__ = ["ThresholdAttack"]


class ThresholdAttack(MemberLosses):
    """How well a threshold on a score of the prediction tells the forgotten samples from samples the model never saw.

    Positive class = member. Members are the samples of the forget set, non-members *held-out* samples; the split says
    which, so there is no way to pass retain samples, which are members, for non-members. The right values are the
    retrained model's: 0.5 only where the forgotten samples are distributed as the held-out ones are.

    Measured (docs/metrics.md): nearly or wholly blind to a forgotten class when held-out samples of that class are
    the non-members, since the model answers both alike, before and after. On clean random samples of small networks
    it may already tell the original from a retrained model.

    Guarantee: heuristic, these are weak attacks, so a value near the retrained model's is no proof. Source: see
    :func:`lightning_unlearn.functional.prediction_scores.membership_score`. Scores are computed in float64 from logits
    of any floating dtype, half precision included, and kept in the metric's dtype (float32 unless
    `set_dtype(torch.float64)` was called); processes may hold either split, both or none.

    Args:
        score: `"loss"`, `"confidence"` (of the true class; orders samples as the loss does), `"entropy"` (knows no
            label) or `"modified_entropy"`.
        min_samples: Fewest members and fewest non-members that a result is given for. With 20 members the standard
            error of the AUROC is about 0.07.
        kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an option is not as above.

    >>> import torch
    >>> metric = ThresholdAttack(score="modified_entropy", min_samples=2)
    >>> metric.update(torch.tensor([[4.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1]), split="forget")
    >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0]), split="test")
    >>> metric.compute()["membership_auroc"]
    tensor(1., dtype=torch.float64)
    """

    def __init__(self, *, score: MembershipScore = "loss", min_samples: int = 10, **kwargs: Any) -> None:
        super().__init__(min_samples=min_samples, **kwargs)
        self.score = check_choice("score", score, MEMBERSHIP_SCORES)

    def update(self, logits: Tensor, targets: Tensor, *, split: Split) -> None:
        """Add samples of one split.

        Args:
            logits: (N, C), of the model under attack.
            targets: (N,), integer class numbers.
            split: `"forget"` (members) or `"test"` (held-out non-members).

        Raises:
            ValueError: the split is another, shapes or class numbers do not fit, or logits are not finite.
        """
        losses = -membership_score(logits.detach(), targets, self.score)
        self._add(losses, split_mask(losses, split))

    def forward(self, logits: Tensor, targets: Tensor, *, split: Split) -> dict[str, Tensor]:
        """Add samples of one split and return nothing: one split alone has no result."""
        self.update(logits, targets, split=split)
        return {}

    def _no_value(self) -> Any:
        return {}

    def compute(self) -> dict[str, Tensor]:
        """AUROC with its standard error, share of members found at 1 % and 0.1 % false alarms, balanced accuracy.

        Raises:
            ValueError: there are fewer than `min_samples` members or non-members.
        """
        return threshold_attack(*self._groups())
