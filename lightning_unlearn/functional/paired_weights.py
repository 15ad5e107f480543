"""Weights of several models by name, and the squares of their differences, also where they are in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import check_choice, expected, shorten
from lightning_unlearn.utilities.sharded import global_sums, local_part, local_part_like

__all__ = ["Buffers", "Weights", "named_weights", "norm", "squared_differences"]

Weights: TypeAlias = nn.Module | Mapping[str, Tensor]
"""A module, or its parameters by name."""

Buffers: TypeAlias = Literal["ignore", "include"]
"""Whether buffers of floating point that a checkpoint holds (BatchNorm's running statistics) count as weights."""


def _of_module(module: nn.Module, name: str, buffers: Buffers) -> dict[str, Tensor]:
    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        rule = "a module whose parameters are whole or DTensors"
        remedy = "Use ModelParallelStrategy (FSDP2), or compare full state dicts."
        raise UnsupportedStrategyError(expected(name, rule, "one under FullyShardedDataParallel (FSDP1)", remedy))
    tensors: dict[str, Tensor] = {key: parameter.detach() for key, parameter in module.named_parameters()}
    if buffers == "include":
        skipped = {
            f"{place}.{buffer}" if place else buffer
            for place, part in module.named_modules()
            for buffer in part._non_persistent_buffers_set  # not in a state dict, so a state dict is no counterpart
        }
        found = {key: buffer.detach() for key, buffer in module.named_buffers() if key not in skipped}
        tensors |= {key: buffer for key, buffer in found.items() if not _is_integer(buffer)}
    return tensors


def _of_mapping(
    weights: Mapping[str, Tensor], counterpart: nn.Module | None, name: str, buffers: Buffers
) -> dict[str, Tensor]:
    tensors = {key: tensor.detach() for key, tensor in weights.items()}
    if counterpart is not None:
        # Beside buffers, a state dict has a tied parameter once per place; the module's own list has it once.
        known = {key for key, _ in counterpart.named_parameters(remove_duplicate=False)}
        known |= {key for key, _ in counterpart.named_buffers(remove_duplicate=False)}
        surplus = known - _of_module(counterpart, name, buffers).keys()
        tensors = {key: tensor for key, tensor in tensors.items() if key not in surplus}
    integers = [key for key, tensor in tensors.items() if _is_integer(tensor)]
    if integers and buffers == "ignore":
        remedy = "Leave buffers out: named_parameters()."
        raise ValueError(expected(name, "floating-point parameters by name", shorten(integers), remedy))
    return {key: tensor for key, tensor in tensors.items() if key not in integers}


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _check_pair(left: Mapping[str, Tensor], right: Mapping[str, Tensor], first: str, name: str) -> None:
    remedy = "Compare models of one architecture."
    if left.keys() != right.keys():
        lacking, surplus = left.keys() - right.keys(), right.keys() - left.keys()
        difference = f"without {shorten(sorted(lacking)) or 'none'}, and with {shorten(sorted(surplus)) or 'none'} more"
        raise ValueError(expected(name, f"weights with the names of `{first}`", difference, remedy))
    for key, tensor in left.items():
        if tensor.shape != right[key].shape:
            rule = f"weights with the shapes of `{first}` ({key}: {tuple(tensor.shape)})"
            raise ValueError(expected(name, rule, tuple(right[key].shape), remedy))


def named_weights(sides: Mapping[str, Weights], buffers: Buffers = "ignore") -> list[dict[str, Tensor]]:
    """The weights of several models by name, which must agree in names and shapes.

    Args:
        sides: Name of an argument, for messages -> module, or its parameters by name. Where one of them is a module,
            the others may be whole state dicts: what is no weight in the first module is no weight there.
        buffers: `"ignore"` or `"include"`, which adds the floating-point buffers that are part of a state dict. Integer
            tensors of a mapping are then taken for counters and left out.

    Returns:
        For each side name -> detached tensor, as they are; the first side's order is the module's or mapping's own.

    Raises:
        ValueError: names or shapes differ, a mapping holds integer tensors, or there is no weight at all.
        UnsupportedStrategyError: a module is wrapped in FSDP1, whose parameters are flat pieces without a layout.

    >>> linear = nn.Linear(1, 1)
    >>> [list(side) for side in named_weights({"a": linear, "b": linear.state_dict()})]
    [['weight', 'bias'], ['weight', 'bias']]
    """
    check_choice("buffers", buffers, get_args(Buffers))
    module = next((one for one in sides.values() if isinstance(one, nn.Module)), None)
    named = {
        name: _of_module(one, name, buffers) if isinstance(one, nn.Module) else _of_mapping(one, module, name, buffers)
        for name, one in sides.items()
    }
    first = next(iter(named))
    if not named[first]:
        raise ValueError(expected(first, "weights with at least one parameter", "none"))
    for name, tensors in named.items():
        _check_pair(named[first], tensors, first, name)
    return list(named.values())


@torch.no_grad()
def squared_differences(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum of the squared differences of every tensor, in float64, on the device of `left`.

    Sharded tensors (DTensor) stay in pieces: each process sums over its own and the sums are added up, in one reduction
    for all tensors that are cut alike. Where one side is sharded and the other whole, the whole one is cut; of two
    different layouts, the right one is gathered, one tensor at a time. Every process must call this then, with the
    tensors in the same order.

    Memory: float64 copies of the part of one tensor, and a whole one where layouts differ.

    Args:
        left: Name -> tensor.
        right: The same names and shapes, in any order, dtype and device.

    Returns:
        Name -> float64 scalar, in the order of `left`, the same on every process.

    >>> squared_differences({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 5.0])})
    {'w': tensor(9., dtype=torch.float64)}
    """
    local, like = [], []
    for key, mine in left.items():
        layout = mine if isinstance(mine, DTensor) else right[key]
        here = local_part(mine) if layout is mine else local_part_like(mine, layout)
        there = local_part_like(right[key], layout).to(here.device)
        local.append((_wide(here) - _wide(there)).abs().square_().sum())
        like.append(layout)
    return dict(zip(left, global_sums(local, like), strict=True))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def norm(squares: Mapping[str, Tensor]) -> Tensor:
    """Root of the sum of squares that may lie on several devices; a scalar on the device of the first.

    >>> norm({"a": torch.tensor(9.0), "b": torch.tensor(16.0)})
    tensor(5.)
    """
    home = next(iter(squares.values())).device
    return torch.stack([square.to(home) for square in squares.values()]).sum().sqrt()
