"""A module without its weights, and the same module with weights given: how a whole model is made beside shards.

A sharded module can neither be copied nor put together again. So what it is made of is copied before it is sharded,
without the memory of its weights, and filled with the whole weights afterwards.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from lightning_unlearn.utilities.whole_weights import WholeWeights, check_fits, named_buffers, named_parameters

__all__ = ["filled", "skeleton_of"]

M = TypeVar("M", bound=nn.Module)


def skeleton_of(module: M) -> M:
    """A deep copy whose parameters and buffers are on the `meta` device; ties between them are kept.

    Args:
        module: Not sharded yet. A device mesh that Lightning has given it is left out.

    >>> skeleton_of(nn.Linear(2, 1)).weight.device
    device(type='meta')
    """
    memo: dict[int, object] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty.detach()
        )
    mesh = getattr(module, "_device_mesh", None)
    if mesh is not None:
        memo[id(mesh)] = mesh  # its process groups cannot be copied, and the copy belongs to none of them
    copied = copy.deepcopy(module, memo)
    if mesh is not None:
        copied._device_mesh = None  # type: ignore[assignment]
    return copied


def filled(skeleton: M, weights: WholeWeights) -> M:
    """A copy of a skeleton that has these tensors as its parameters and buffers, not copies of them.

    Args:
        skeleton: From `skeleton_of`; stays as it is.
        weights: Whole tensors by the same names and of the same shapes.

    Raises:
        ValueError: names or shapes differ, or the tensors are another process'.

    >>> from lightning_unlearn.utilities.whole_weights import whole_tensors
    >>> linear = nn.Linear(2, 1)
    >>> torch.equal(filled(skeleton_of(linear), whole_tensors(linear))(torch.ones(2)), linear(torch.ones(2)))
    True
    """
    parameters, buffers = named_parameters(skeleton), named_buffers(skeleton)
    given = check_fits(weights, parameters | buffers)
    memo: dict[int, object] = {
        id(one): nn.Parameter(given[name], one.requires_grad) for name, one in parameters.items()
    }
    memo |= {id(one): given[name] for name, one in buffers.items()}
    return copy.deepcopy(skeleton, memo)
