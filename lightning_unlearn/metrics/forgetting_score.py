"""`ForgettingScore`: the forgetting quality of the NeurIPS 2023 unlearning competition, as a torchmetrics metric."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_unlearn.functional.forgetting_score import forgetting_score
from lightning_unlearn.functional.margins import MARGIN_LIMIT
from lightning_unlearn.metrics.many_models import ManyModelsMetric
from lightning_unlearn.results import Target

__all__ = ["ForgettingScore"]


class ForgettingScore(ManyModelsMetric):
    """Mean points over the samples, by the largest epsilon at which unlearned models betray themselves.

    Source, definition and options: :func:`lightning_unlearn.functional.forgetting_score.forgetting_score`; the final
    score, with its ratios of accuracies, is `competition_score` there. Compare it at one number of models only. One
    update a model.

    Measured (docs/metrics.md): with four models a group it says nothing, for two groups of retrained models are
    almost as far apart as it goes. Measure that floor before anything else.

    Args:
        delta: Of (epsilon, delta)-indistinguishability.
        resolution: Thresholds in a unit of the margin.
        clip: Margins are clipped to [-clip, clip].
        kwargs: See :class:`torchmetrics.Metric`.

    >>> import torch
    >>> metric = ForgettingScore()
    >>> for seed in range(4):
    ...     for group in ("unlearned", "retrained"):
    ...         metric.update(torch.tensor([[float(seed), 0.0]]), torch.tensor([0]), group=group, model=seed)
    >>> metric.compute()
    tensor(1., dtype=torch.float64)
    """

    higher_is_better: bool = True
    target: ClassVar[Target] = "high"

    def __init__(
        self, *, delta: float = 1e-5, resolution: int = 100, clip: float = MARGIN_LIMIT, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {"delta": delta, "resolution": resolution, "clip": clip}

    def compute(self) -> Tensor:
        """Mean points, a float64 scalar in [0, 1].

        Raises:
            ValueError: fewer than three models in a group, models saw different samples, or an option is out of range.
        """
        return forgetting_score(*self.margins_by_group(), **self.options)
