"""Distance between the weights of an unlearned and of a retrained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor, nn

from lightning_unlearn.utilities.checks import expected, shorten

__all__ = ["Weights", "verification_error"]

Weights: TypeAlias = nn.Module | Mapping[str, Tensor]
"""A module, or its parameters by name."""


def _parameters(weights: Weights, counterpart: Weights, name: str) -> dict[str, Tensor]:
    """Parameters by name; a state dict next to a module is cut down to what are parameters there."""
    if isinstance(weights, nn.Module):
        return {key: parameter.detach() for key, parameter in weights.named_parameters()}
    tensors = {key: tensor.detach() for key, tensor in weights.items()}
    if isinstance(counterpart, nn.Module):
        buffers = {key for key, _ in counterpart.named_buffers()}
        # A state dict names a tied parameter once per place; the module's own list names it once.
        tied = {key for key, _ in counterpart.named_parameters(remove_duplicate=False)}
        tied -= {key for key, _ in counterpart.named_parameters()}
        tensors = {key: tensor for key, tensor in tensors.items() if key not in buffers | tied}
    whole = [key for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if whole:
        raise ValueError(
            expected(
                name, "floating-point parameters by name", shorten(whole), "Leave buffers out: named_parameters()."
            )
        )
    return tensors


def _check_pair(left: Mapping[str, Tensor], right: Mapping[str, Tensor], name: str) -> None:
    if left.keys() != right.keys():
        lacking, surplus = left.keys() - right.keys(), right.keys() - left.keys()
        difference = f"without {shorten(sorted(lacking)) or 'none'}, and with {shorten(sorted(surplus)) or 'none'} more"
        raise ValueError(
            expected(name, "weights with the names of `unlearned`", difference, "Compare models of one architecture.")
        )
    shapes = [key for key in left if left[key].shape != right[key].shape]
    if shapes:
        key = shapes[0]
        raise ValueError(
            expected(
                name,
                f"weights with the shapes of `unlearned` ({key}: {tuple(left[key].shape)})",
                tuple(right[key].shape),
                "Compare models of one architecture.",
            )
        )


def _squares(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: (left[key].double() - right[key].to(left[key].device).double()).square().sum() for key in left}


def _total(squares: Mapping[str, Tensor]) -> Tensor:
    home = next(iter(squares.values())).device
    return torch.stack([square.to(home) for square in squares.values()]).sum()


@overload
def verification_error(
    unlearned: Weights, retrained: Weights, *, relative_to: Weights | None = ..., per_layer: Literal[False] = ...
) -> Tensor: ...


@overload
def verification_error(
    unlearned: Weights, retrained: Weights, *, relative_to: Weights | None = ..., per_layer: Literal[True]
) -> dict[str, Tensor]: ...


@torch.no_grad()
def verification_error(
    unlearned: Weights, retrained: Weights, *, relative_to: Weights | None = None, per_layer: bool = False
) -> Tensor | dict[str, Tensor]:
    r"""Verification error :math:`\lVert w_u - w_g \rVert_2` (Thudi et al. 2021, arXiv 2109.13398).

    The L2 distance over all parameters: BatchNorm's scale and shift belong to it, its running statistics do not.
    Parameters are paired by name and the sum is accumulated in float64. Frozen parameters count as well: where both
    models share them they add nothing, and a model frozen for inference is still measured.

    The number means what the paper means only for a *pair*: a retrained model with the same initial weights and the
    same order of data, the forgotten samples left out. Between unrelated training runs it shows the noise of training.
    A small distance alone is never evidence of forgetting.

    Args:
        unlearned: Module, or its parameters by name.
        retrained: Module, or its parameters by name. Where only one of the two is a module, the other may be its
            whole `state_dict()`; buffers in it are ignored.
        relative_to: The weights that training started from. The result is then divided by the distance the retrained
            model travelled from them, so 1 means "as far from the retrained model as the initial weights are".
        per_layer: Return the distance of every parameter, by name. Their root sum of squares is the total, with
            `relative_to` as well.

    Returns:
        A float64 scalar, or a dictionary of them.

    Raises:
        ValueError: names or shapes differ, a mapping holds integer tensors, there is no parameter at all, or the
            retrained model has not moved from `relative_to`.

    >>> a = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0])}
    >>> b = {"w": torch.tensor([1.0, -1.0]), "b": torch.tensor([4.0])}
    >>> verification_error(a, b)
    tensor(5., dtype=torch.float64)
    >>> verification_error(a, b, per_layer=True)["w"]
    tensor(3., dtype=torch.float64)
    """
    left = _parameters(unlearned, retrained, "unlearned")
    right = _parameters(retrained, unlearned, "retrained")
    if not left:
        raise ValueError(expected("unlearned", "weights with at least one parameter", "none"))
    _check_pair(left, right, "retrained")
    scale = 1.0
    if relative_to is not None:
        counterpart = retrained if isinstance(retrained, nn.Module) else unlearned
        start = _parameters(relative_to, counterpart, "relative_to")
        _check_pair(left, start, "relative_to")
        scale = float(_total(_squares(right, start)).sqrt())
        if scale == 0:
            raise ValueError(
                expected("relative_to", "weights other than the retrained model's", "equal weights", "Pass w_0.")
            )
    squares = _squares(left, right)
    if per_layer:
        return {key: square.sqrt() / scale for key, square in squares.items()}
    return _total(squares).sqrt() / scale
