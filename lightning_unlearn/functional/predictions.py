"""Predicted classes, from the forms in which models give them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import expected

__all__ = ["class_numbers", "predicted_classes"]


def class_numbers(labels: Tensor, name: str = "targets") -> Tensor:
    """Return (N,) integer class numbers as int64.

    Args:
        labels: (N,), any integer dtype.
        name: Name of the argument, for the message.

    Raises:
        ValueError: it is no vector of integers.

    >>> class_numbers(torch.tensor([1, 0], dtype=torch.uint8))
    tensor([1, 0])
    """
    other = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    if labels.ndim != 1 or other:
        raise ValueError(expected(name, "integer class numbers (N,)", (tuple(labels.shape), labels.dtype)))
    return labels.long()


def predicted_classes(outputs: Tensor, name: str = "outputs") -> Tensor:
    """The class number that each output stands for.

    Args:
        outputs: (N, C) logits or probabilities of any floating dtype, of which the largest wins (the first of equal
            ones), or (N,) class numbers.
        name: Name of the argument, for the message.

    Returns:
        int64 of shape (N,).

    Raises:
        ValueError: it is neither.

    >>> predicted_classes(torch.tensor([[0.1, 0.9], [2.0, -1.0]])), predicted_classes(torch.tensor([1, 0]))
    (tensor([1, 0]), tensor([1, 0]))
    """
    if outputs.ndim == 1:
        return class_numbers(outputs, name)
    if outputs.ndim != 2 or not outputs.is_floating_point() or not outputs.shape[1]:
        rule = "floating outputs (N, C) or integer class numbers (N,)"
        raise ValueError(expected(name, rule, (tuple(outputs.shape), outputs.dtype)))
    return outputs.argmax(dim=1)
