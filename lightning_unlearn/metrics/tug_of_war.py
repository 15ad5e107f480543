"""`TugOfWar`: ToW of Zhao et al., as a torchmetrics metric."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_unlearn.metrics.accuracy_gaps import AccuracyGaps
from lightning_unlearn.results import Target

__all__ = ["TugOfWar"]


class TugOfWar(AccuracyGaps):
    """Product over forget, retain and test of one minus the accuracy's gap to the retrained model (arXiv 2406.01257).

    1 is best: all three accuracies are the retrained model's. Two independent retrainings are not at 1 either. See
    :func:`lightning_unlearn.functional.score_gaps.tug_of_war`, and
    :func:`~lightning_unlearn.functional.score_gaps.tug_of_war_membership` for ToW-MIA, whose attack is trained and
    therefore no function of batches.

    Measured (docs/metrics.md): on clean random samples of small networks it already tells the original from a
    retrained model, by a few times what retrainings differ; such networks fit their training samples a little
    better.

    Args:
        kwargs: See :class:`torchmetrics.Metric`.

    >>> import torch
    >>> metric, right, wrong = TugOfWar(), torch.tensor([0, 1]), torch.tensor([1, 1])
    >>> metric.update(right, wrong, right, split="forget")
    >>> for split in ("retain", "test"):
    ...     metric.update(right, right, right, split=split)
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better: bool = True
    target: ClassVar[Target] = "high"

    def compute(self) -> Tensor:
        """A float64 scalar in [0, 1]; NaN before all three splits were seen."""
        return (1 - self.gaps()).prod()
