"""`ULiRA`: the likelihood ratio attack on unlearned models, as a torchmetrics metric."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_unlearn.functional.margins import MARGIN_LIMIT
from lightning_unlearn.functional.membership import membership_auroc, membership_tpr_at_fpr
from lightning_unlearn.functional.u_lira import u_lira, u_lira_accuracy
from lightning_unlearn.metrics.many_models import ManyModelsMetric, ModelGroup
from lightning_unlearn.results import Target

__all__ = ["ULiRA"]


class ULiRA(ManyModelsMetric):
    """How well a Gaussian likelihood ratio tells unlearned from retrained models, over all models and samples.

    Source, definition and options: :func:`lightning_unlearn.functional.u_lira.u_lira`. The right value is that of one
    group of retrained models against another: accuracy and AUROC 0.5, and as many found as accused. One update a
    model; folds follow the order of the models' numbers. Give models that share something, such as a seed, the same
    place in both groups: they are then attacked together, and neither is in the other's fit.

    Measured (docs/metrics.md): on clean random samples of small networks it already tells the original from a
    retrained model, by a few times what retrainings differ; such networks fit their training samples a little
    better.

    Args:
        folds: In how many parts the models are attacked.
        variance_floor: Smallest variance of a fit.
        clip: Margins are clipped to [-clip, clip].
        kwargs: See :class:`torchmetrics.Metric`.

    >>> import torch
    >>> metric = ULiRA(folds=2)
    >>> for seed in range(4):
    ...     outputs = torch.tensor([[float(seed), 0.0]])
    ...     metric.update(outputs + torch.tensor([9.0, 0.0]), torch.tensor([0]), group="unlearned", model=seed)
    ...     metric.update(outputs, torch.tensor([0]), group="retrained", model=seed)
    >>> {name: float(value) for name, value in metric.compute().items() if "tpr" not in name}
    {'u_lira_accuracy': 1.0, 'u_lira_auroc': 1.0}
    """

    higher_is_better: bool = False
    target: ClassVar[Target] = "retrained"

    def __init__(
        self, *, folds: int = 5, variance_floor: float = 1e-6, clip: float = MARGIN_LIMIT, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {"folds": folds, "variance_floor": variance_floor, "clip": clip}

    def forward(self, logits: Tensor, targets: Tensor, *, group: ModelGroup, model: int) -> dict[str, Tensor]:
        """Add all outputs of one model and return nothing: one model alone has no values."""
        self.update(logits, targets, group=group, model=model)
        return {}

    def _no_value(self) -> Any:
        return {}

    def compute(self) -> dict[str, Tensor]:
        """Balanced accuracy, AUROC, and the share of unlearned models found at 1 % and 0.1 % false alarms.

        Raises:
            ValueError: too few models for so many folds, or as for other metrics of many models.
        """
        unlearned, retrained = u_lira(*self.margins_by_group(), **self.options)
        # The attack of `membership` takes losses: the smaller, the more likely a member.
        members, nonmembers = -unlearned.flatten(), -retrained.flatten()
        return {
            "u_lira_accuracy": u_lira_accuracy(unlearned, retrained).mean(),
            "u_lira_auroc": membership_auroc(members, nonmembers),
            "u_lira_tpr_at_1e-2_fpr": membership_tpr_at_fpr(members, nonmembers, 0.01),
            "u_lira_tpr_at_1e-3_fpr": membership_tpr_at_fpr(members, nonmembers, 0.001),
        }
