"""`KLOM`: distance of the margins of unlearned models from those of retrained ones, as a torchmetrics metric."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_unlearn.functional.klom import klom
from lightning_unlearn.functional.margins import MARGIN_LIMIT
from lightning_unlearn.metrics.many_models import ManyModelsMetric
from lightning_unlearn.results import Target

__all__ = ["KLOM"]


class KLOM(ManyModelsMetric):
    """Mean over samples of KL(unlearned || retrained) between histograms of margins, in nats.

    Source, definition and options: :func:`lightning_unlearn.functional.klom.klom`. Two groups of retrained models are
    not at 0 either; their value is the one to reach. One update a model.

    Measured (docs/metrics.md): with four models a group it says nothing, for two groups of retrained models are
    almost as far apart as it goes. Measure that floor before anything else.

    Args:
        bins: Bins over the joint range of each sample.
        clip: Margins are clipped to [-clip, clip].
        epsilon: Smallest share of the retrained group where the unlearned group has one.
        closed: Whether the last bin holds its upper edge.
        kwargs: See :class:`torchmetrics.Metric`.

    >>> import torch
    >>> metric = KLOM()
    >>> for seed, logit in enumerate([0.0, 1.0]):
    ...     metric.update(torch.tensor([[2 * logit, 0.0]]), torch.tensor([0]), group="unlearned", model=seed)
    ...     metric.update(torch.tensor([[logit, 0.0]]), torch.tensor([0]), group="retrained", model=seed)
    >>> round(float(metric.compute()), 2)
    5.41
    """

    higher_is_better: bool = False
    target: ClassVar[Target] = "low"

    def __init__(
        self,
        *,
        bins: int = 20,
        clip: float = MARGIN_LIMIT,
        epsilon: float = 1e-5,
        closed: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {"bins": bins, "clip": clip, "epsilon": epsilon, "closed": closed}

    def compute(self) -> Tensor:
        """Mean over the samples, a float64 scalar.

        Raises:
            ValueError: a group has no model, models saw different samples, or an option is out of range.
        """
        return klom(*self.margins_by_group(), **self.options).mean()

    def compute_per_sample(self) -> Tensor:
        """Value of every sample in the order of the outputs, (samples,) in float64; for quantiles.

        Under several processes all of them have to call it.

        Raises:
            ValueError: as for :meth:`compute`.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return klom(*self.margins_by_group(), **self.options)
