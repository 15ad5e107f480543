"""`AverageGap`: mean distance of the accuracies from the retrained model's, as a torchmetrics metric."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_unlearn.metrics.accuracy_gaps import AccuracyGaps
from lightning_unlearn.results import Target

__all__ = ["AverageGap"]


class AverageGap(AccuracyGaps):
    """Mean over forget, retain and test of the accuracy's gap to the retrained model; 0 is best.

    Two independent retrainings are not at 0 either. The tables that made it common add a membership attack as the
    fourth number: see :func:`lightning_unlearn.functional.score_gaps.average_gap`, which takes one.

    Measured (docs/metrics.md): on clean random samples of small networks it already tells the original from a
    retrained model, by a few times what retrainings differ; such networks fit their training samples a little
    better.

    Args:
        kwargs: See :class:`torchmetrics.Metric`.

    >>> import torch
    >>> metric, right, wrong = AverageGap(), torch.tensor([0, 1]), torch.tensor([1, 0])
    >>> metric.update(wrong, right, right, split="forget")
    >>> for split in ("retain", "test"):
    ...     metric.update(right, right, right, split=split)
    >>> metric.compute()
    tensor(0.3333, dtype=torch.float64)
    """

    higher_is_better: bool = False
    target: ClassVar[Target] = "low"

    def compute(self) -> Tensor:
        """A float64 scalar in [0, 1]; NaN before all three splits were seen."""
        return self.gaps().mean()
