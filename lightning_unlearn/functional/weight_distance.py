"""Distance between the weights of two models, and the one between an unlearned and a retrained model."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from lightning_unlearn.functional.paired_weights import Buffers, Weights, named_weights, norm, squared_differences
from lightning_unlearn.utilities.checks import expected

__all__ = ["Weights", "verification_error", "weight_distance"]


@overload
def weight_distance(
    left: Weights, right: Weights, *, buffers: Buffers = ..., per_layer: Literal[False] = ...
) -> Tensor: ...


@overload
def weight_distance(
    left: Weights, right: Weights, *, buffers: Buffers = ..., per_layer: Literal[True]
) -> dict[str, Tensor]: ...


@overload
def weight_distance(
    left: Weights, right: Weights, *, buffers: Buffers = ..., per_layer: bool
) -> Tensor | dict[str, Tensor]: ...


@torch.no_grad()
def weight_distance(
    left: Weights, right: Weights, *, buffers: Buffers = "ignore", per_layer: bool = False
) -> Tensor | dict[str, Tensor]:
    """L2 distance over all weights of two models, paired by name and accumulated in float64.

    Frozen parameters count as well: where both models share them they add nothing, and a model frozen for inference is
    still measured. A tied parameter counts once.

    Sharded models (DTensor parameters) may stand on either side or on both; see
    :func:`lightning_unlearn.functional.paired_weights.squared_differences`. Every process must call this then, and
    each gets the number that one process would, up to the order of float64 sums.

    Args:
        left: Module, or its parameters by name.
        right: Module, or its parameters by name. Where only one of the two is a module, the other may be its whole
            `state_dict()`.
        buffers: `"ignore"`, or `"include"` for the floating-point buffers of the state dict (running statistics, not
            the count of batches) as well.
        per_layer: Return the distance of every tensor, by name. Their root sum of squares is the total.

    Returns:
        A float64 scalar, or a dictionary of them.

    Raises:
        ValueError: names or shapes differ, a mapping holds integer tensors while buffers are ignored, or there is no
            parameter at all.
        UnsupportedStrategyError: a module is wrapped in FSDP1.

    >>> start = torch.nn.BatchNorm1d(1)
    >>> moved = {**start.state_dict(), "bias": torch.tensor([3.0]), "running_mean": torch.tensor([4.0])}
    >>> weight_distance(start, moved), weight_distance(start, moved, buffers="include")
    (tensor(3., dtype=torch.float64), tensor(5., dtype=torch.float64))
    """
    squares = squared_differences(*named_weights({"left": left, "right": right}, buffers))
    return {key: square.sqrt() for key, square in squares.items()} if per_layer else norm(squares)


@overload
def verification_error(
    unlearned: Weights,
    retrained: Weights,
    *,
    relative_to: Weights | None = ...,
    per_layer: Literal[False] = ...,
    buffers: Buffers = ...,
) -> Tensor: ...


@overload
def verification_error(
    unlearned: Weights,
    retrained: Weights,
    *,
    relative_to: Weights | None = ...,
    per_layer: Literal[True],
    buffers: Buffers = ...,
) -> dict[str, Tensor]: ...


@overload
def verification_error(
    unlearned: Weights,
    retrained: Weights,
    *,
    relative_to: Weights | None = ...,
    per_layer: bool,
    buffers: Buffers = ...,
) -> Tensor | dict[str, Tensor]: ...


@torch.no_grad()
def verification_error(
    unlearned: Weights,
    retrained: Weights,
    *,
    relative_to: Weights | None = None,
    per_layer: bool = False,
    buffers: Buffers = "ignore",
) -> Tensor | dict[str, Tensor]:
    r"""Verification error :math:`\lVert w_u - w_g \rVert_2` (Thudi et al. 2021, arXiv 2109.13398).

    The L2 distance over all parameters: BatchNorm's scale and shift belong to it, its running statistics do not, unless
    asked for. Pairing, precision and sharded models are as in :func:`weight_distance`.

    The number means what the paper means only for a *pair*: a retrained model with the same initial weights and the
    same order of data, the forgotten samples left out. Between unrelated training runs it shows the noise of training.
    A small distance alone is never evidence of forgetting.

    Args:
        unlearned: Module, or its parameters by name.
        retrained: Module, or its parameters by name. Where only one of the two is a module, the other may be its
            whole `state_dict()`.
        relative_to: The weights that training started from. The result is then divided by the distance the retrained
            model travelled from them, so 1 means "as far from the retrained model as the initial weights are".
        per_layer: Return the distance of every parameter, by name. Their root sum of squares is the total, with
            `relative_to` as well.
        buffers: `"ignore"` as in the paper, or `"include"` to count floating-point buffers too, here and in the
            distance travelled.

    Returns:
        A float64 scalar, or a dictionary of them.

    Raises:
        ValueError: names or shapes differ, a mapping holds integer tensors while buffers are ignored, there is no
            parameter at all, or the retrained model has not moved from `relative_to`.
        UnsupportedStrategyError: a module is wrapped in FSDP1.

    >>> a = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0])}
    >>> b = {"w": torch.tensor([1.0, -1.0]), "b": torch.tensor([4.0])}
    >>> verification_error(a, b)
    tensor(5., dtype=torch.float64)
    >>> verification_error(a, b, per_layer=True)["w"]
    tensor(3., dtype=torch.float64)
    """
    sides = {"unlearned": unlearned, "retrained": retrained}
    if relative_to is not None:
        sides["relative_to"] = relative_to
    left, right, *start = named_weights(sides, buffers)
    scale = float(norm(squared_differences(right, start[0]))) if start else 1.0
    if scale == 0:
        rule = "weights other than the retrained model's"
        raise ValueError(expected("relative_to", rule, "equal weights", "Pass w_0."))
    squares = squared_differences(left, right)
    if per_layer:
        return {key: square.sqrt() / scale for key, square in squares.items()}
    return norm(squares) / scale
