"""Unlearning error: how far off a single-gradient deletion may be, from one training run and no retrained model."""

from __future__ import annotations

from typing import Literal, TypeVar, overload

import torch
from torch import Tensor

from lightning_unlearn.functional.paired_weights import Buffers, Weights, named_weights, norm, squared_differences
from lightning_unlearn.utilities.checks import check_positive, check_positive_int, expected

__all__ = ["unlearning_error", "unlearning_error_from_distance"]

Distance = TypeVar("Distance", float, Tensor)


def unlearning_error_from_distance(distance: Distance, *, lr: float, steps: int, singular_value: float) -> Distance:
    r"""The unlearning error of a run whose distance from its start is known: :math:`\eta^2 d \sigma (t - 1) / 2`.

    Args:
        distance: :math:`d = \lVert w_t - w_0 \rVert_2`, a number or a tensor of any shape.
        lr: Learning rate :math:`\eta`; see :func:`unlearning_error` for one that changes.
        steps: Optimizer steps `t` between the two, at least 1. One step alone has an error of 0.
        singular_value: :math:`\sigma`, the largest singular value of the loss' Hessian, averaged over the run.

    Returns:
        As `distance`.

    Raises:
        ValueError: `lr` or `steps` is not positive, or `singular_value` is negative or not finite.

    >>> unlearning_error_from_distance(5.0, lr=0.5, steps=9, singular_value=2.0)
    10.0
    """
    check_positive("lr", lr)
    check_positive_int("steps", steps)
    check_positive("singular_value", singular_value, zero=True)
    return distance * (lr**2 * singular_value * (steps - 1) / 2)


@overload
def unlearning_error(
    weights: Weights,
    initial: Weights,
    *,
    lr: float,
    steps: int,
    singular_value: float,
    relative: bool = ...,
    per_layer: Literal[False] = ...,
    buffers: Buffers = ...,
) -> Tensor: ...


@overload
def unlearning_error(
    weights: Weights,
    initial: Weights,
    *,
    lr: float,
    steps: int,
    singular_value: float,
    relative: bool = ...,
    per_layer: Literal[True],
    buffers: Buffers = ...,
) -> dict[str, Tensor]: ...


@overload
def unlearning_error(
    weights: Weights,
    initial: Weights,
    *,
    lr: float,
    steps: int,
    singular_value: float,
    relative: bool = ...,
    per_layer: bool,
    buffers: Buffers = ...,
) -> Tensor | dict[str, Tensor]: ...


@torch.no_grad()
def unlearning_error(
    weights: Weights,
    initial: Weights,
    *,
    lr: float,
    steps: int,
    singular_value: float,
    relative: bool = False,
    per_layer: bool = False,
    buffers: Buffers = "ignore",
) -> Tensor | dict[str, Tensor]:
    r"""Unlearning error :math:`\eta^2 \lVert w_t - w_0 \rVert_2 \sigma (t - 1) / 2` (Thudi et al. 2021).

    What remains of the verification error after a single-gradient deletion, estimated from the training run alone: no
    retrained model is needed (arXiv 2109.13398). It is a proxy and *no bound*: on softmax regression the true error was
    found from 2.4 times below it to 26 times above it. What it does there is to order settings, such as learning rate
    and duration, as the true error does.

    It belongs to plain SGD with a constant learning rate. With a schedule the formula, read step by step, asks for the
    mean of :math:`\eta^2` over the steps, so pass the root mean square of the learning rates; this is a reading of this
    package, as are the relative form and the one by layer, and none of them is in the paper. The singular value of a
    symmetric Hessian is :math:`|\lambda|`; the authors' code puts the root of the top eigenvalue in its place. See
    :mod:`lightning_unlearn.functional.power_iteration` for both.

    Pairing by name, precision and sharded models are as in
    :func:`lightning_unlearn.functional.weight_distance.weight_distance`.

    Args:
        weights: Module after the training, or its parameters by name.
        initial: Weights that the training, or fine-tuning, started from.
        lr: Learning rate of SGD.
        steps: Optimizer steps between the two, at least 1.
        singular_value: Largest singular value of the training loss' Hessian, averaged over the run.
        relative: Divide by the distance travelled, :math:`\lVert w_t - w_0 \rVert_2`. 1 says
            that the error is as large as the way that training went.
        per_layer: Return the share of every parameter, by name, with the singular value of the whole Hessian. Their
            root sum of squares is the total, with `relative` as well.
        buffers: `"ignore"` as in the paper, or `"include"` to count floating-point buffers as weights.

    Returns:
        A float64 scalar, or a dictionary of them.

    Raises:
        ValueError: names or shapes differ, a mapping holds integer tensors while buffers are ignored, there is no
            parameter at all, a number is out of range, or `relative` is asked of weights that have not moved.
        UnsupportedStrategyError: a module is wrapped in FSDP1.

    >>> start, end = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}
    >>> unlearning_error(end, start, lr=0.5, steps=9, singular_value=2.0)
    tensor(10., dtype=torch.float64)
    >>> unlearning_error(end, start, lr=0.5, steps=9, singular_value=2.0, relative=True)
    tensor(2., dtype=torch.float64)
    """
    factor = unlearning_error_from_distance(1.0, lr=lr, steps=steps, singular_value=singular_value)
    squares = squared_differences(*named_weights({"weights": weights, "initial": initial}, buffers))
    travelled = norm(squares)
    if relative:
        if travelled == 0:
            raise ValueError(expected("initial", "weights other than the trained ones", "equal weights", "Pass w_0."))
        factor /= float(travelled)
    return {key: square.sqrt() * factor for key, square in squares.items()} if per_layer else travelled * factor
