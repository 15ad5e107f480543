"""Bias removal: are the wrong labels, which a model was trained with, still what it answers?"""

from __future__ import annotations

from torch import Tensor

from lightning_unlearn.functional.predictions import class_numbers, predicted_classes
from lightning_unlearn.utilities.checks import expected

__all__ = ["bias_removal_error"]


def bias_removal_error(outputs: Tensor, given_targets: Tensor) -> Tensor:
    """1 for each forgotten sample that is still given the label it was trained with, else 0.

    Where the forget set holds wrong labels, the goal of unlearning is that the model answers anything else: bias
    removal, in the words of Alon and Dar 2025 (arXiv 2503.08633), who set it against privacy, where the forgotten
    samples should look like held-out ones. The goal is theirs; to measure it by the share of labels that are still
    given, the mean of what this returns, is this package's reading.

    0 means that no given label is left, and says nothing about whether the answers are right now: see the accuracy on
    the true labels. A retrained model is rarely at 0, since it makes some of these mistakes by itself.

    Args:
        outputs: Of the model on the forget set: logits or probabilities (N, C), or class numbers (N,).
        given_targets: (N,) integer class numbers the model was trained with, not the true ones.

    Returns:
        float64 of shape (N,).

    Raises:
        ValueError: the shapes do not belong together.

    >>> import torch
    >>> bias_removal_error(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
    tensor([1., 0.], dtype=torch.float64)
    """
    answers, given = predicted_classes(outputs), class_numbers(given_targets, "given_targets")
    if answers.shape != given.shape:
        raise ValueError(expected("given_targets", f"{len(answers)} class numbers", len(given)))
    return (answers == given.to(answers.device)).double()
