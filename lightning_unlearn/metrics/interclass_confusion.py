"""`InterclassConfusion`: whether two classes whose labels were swapped are still taken for each other."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from lightning_unlearn.functional.interclass_confusion import check_class_pair, fgt_error, ic_error
from lightning_unlearn.metrics.agreement import AgreeingMetric
from lightning_unlearn.results import Target

__all__ = ["InterclassConfusion"]


class InterclassConfusion(AgreeingMetric, MulticlassConfusionMatrix):
    """Errors of a model between two classes, some of whose training samples had their labels swapped.

    `ic_error` is the share of samples of the two classes that get any wrong class, `fgt_error` the number of those that
    get the other of the two; see :mod:`lightning_unlearn.functional.interclass_confusion` for both and their source.
    Feed data with true labels, retain or test, one metric for each. The right values are the retrained model's.

    Measured (docs/metrics.md): a dozen swapped labels of the pair leave no trace in it, for a network memorises
    them and errs nowhere else; it is meant for hundreds.

    The state is the confusion matrix in int64, summed over processes: counts of a process without one of the classes,
    or without any sample, are as good as any others.

    Args:
        num_classes: Number of classes.
        classes: The two classes A and B.
        kwargs: See :class:`torchmetrics.classification.MulticlassConfusionMatrix`.

    Raises:
        ValueError: the classes are not two different ones.

    >>> import torch
    >>> metric = InterclassConfusion(num_classes=3, classes=(0, 1))
    >>> metric.update(torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 0, 0, 1, 1]))
    >>> metric.compute()
    {'ic_error': tensor(0.6000, dtype=torch.float64), 'fgt_error': tensor(2)}
    """

    is_differentiable: bool = False
    higher_is_better: bool = False
    full_state_update: bool = False
    target: ClassVar[Target] = "retrained"

    def __init__(self, num_classes: int, classes: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(num_classes=num_classes, **kwargs)
        self.classes = check_class_pair(classes, num_classes)

    def _no_value(self) -> Any:
        return {}

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """`ic_error`, a float64 scalar (NaN where neither class has a sample), and `fgt_error`, a count."""
        return {
            "ic_error": ic_error(self.confmat, self.classes),
            "fgt_error": fgt_error(self.confmat, self.classes),
        }

    def plot(self, val: Any = None, ax: Any = None) -> Any:  # type: ignore[override]
        """Plot one result of `compute` or a list of them; see :meth:`torchmetrics.Metric.plot`."""
        return Metric._plot(self, val, ax)
