"""Inputs moved against a model: the fast gradient sign step."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import check_positive, check_positive_int, expected

__all__ = ["gradient_sign_step"]


def gradient_sign_step(
    inputs: Tensor,
    gradient: Tensor,
    *,
    epsilon: float,
    value_range: tuple[float, float] | None = None,
    levels: int | None = None,
) -> Tensor:
    r"""Move every entry by :math:`\epsilon` in the direction of its gradient (Goodfellow et al. 2015).

    Args:
        inputs: x, floating-point.
        gradient: Gradient of a loss in x, same shape; an entry with gradient 0 stays.
        epsilon: Length of the step in every entry, in units of the inputs.
        value_range: Smallest and largest value an input may have; what lies outside is clipped.
        levels: Number of steps between 0 and 1 that inputs are rounded to, 255 for images of 8 bits.

    Raises:
        ValueError: the shapes differ, or a number is out of range.

    >>> gradient_sign_step(torch.tensor([0.5, 0.98, 0.5]), torch.tensor([-3.0, 1.0, 0.0]), epsilon=0.1)
    tensor([0.4000, 1.0800, 0.5000])
    >>> gradient_sign_step(torch.tensor([0.98]), torch.tensor([1.0]), epsilon=0.1, value_range=(0, 1))
    tensor([1.])
    """
    check_positive("epsilon", epsilon, zero=True)
    if inputs.shape != gradient.shape:
        raise ValueError(expected("gradient", f"of the inputs' shape {tuple(inputs.shape)}", tuple(gradient.shape)))
    moved = inputs.detach() + epsilon * gradient.detach().sign()
    if value_range is not None:
        low, high = value_range
        if not low < high:
            raise ValueError(expected("value_range", "a smaller and a larger number", value_range))
        moved = moved.clamp(low, high)
    return moved if levels is None else torch.round(moved * check_positive_int("levels", levels)) / levels
