"""What ToW and the average gap have in common: the accuracies of two models on the same three splits."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from lightning_unlearn.functional.predictions import class_numbers, predicted_classes
from lightning_unlearn.metrics.agreement import AgreeingMetric
from lightning_unlearn.types import Split
from lightning_unlearn.utilities.checks import check_choice, expected

__all__ = ["AccuracyGaps"]

_SPLITS: tuple[Split, ...] = get_args(Split)


class AccuracyGaps(AgreeingMetric):
    """Accuracies of a model and of the retrained one on forget, retain and test data, counted together.

    The state is the number of right answers of both models and of samples by split, in int64 and summed over processes:
    missing classes, uneven batches and processes without a split change nothing.

    Args:
        kwargs: See :class:`torchmetrics.Metric`.
    """

    is_differentiable: bool = False
    full_state_update: bool = False

    correct: Tensor
    samples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.zeros(2, len(_SPLITS), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros(len(_SPLITS), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, reference_outputs: Tensor, targets: Tensor, *, split: Split) -> None:
        """Add the answers of both models to the same samples.

        Args:
            outputs: Of the model under test: logits or probabilities (N, C), or class numbers (N,).
            reference_outputs: Of the retrained model, in either form.
            targets: (N,) integer class numbers.
            split: `"forget"`, `"retain"` or `"test"`.

        Raises:
            ValueError: the split is unknown, or the three do not have one entry for each of N samples.
        """
        position = _SPLITS.index(check_choice("split", split, _SPLITS))
        answers = predicted_classes(outputs), predicted_classes(reference_outputs, "reference_outputs")
        targets = class_numbers(targets)
        sizes = [len(answers[0]), len(answers[1]), len(targets)]
        if len(set(sizes)) > 1:
            raise ValueError(expected("outputs, reference_outputs and targets", "of the same samples", sizes))
        for model, found in enumerate(answers):
            self.correct[model, position] += (found == targets.to(found.device)).sum().to(self.correct)
        self.samples[position] += len(targets)

    def gaps(self) -> Tensor:
        """Distance of the two accuracies, float64 of shape (3,) for forget, retain, test; NaN for an unseen split."""
        accuracies = self.correct.double() / self.samples
        return (accuracies[0] - accuracies[1]).abs()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
