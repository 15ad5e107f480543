"""Whole tensors put into a module that was copied without its weights.

A sharded module can neither be copied nor put together again. So what it is made of is copied before it is sharded,
without the memory of its weights, and filled with the whole weights afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.whole_weights import WholeWeights, named_buffers, named_parameters

__all__ = ["filled", "skeleton_of"]

M = TypeVar("M", bound=nn.Module)

_BEFORE = "Make all parameters in `__init__`; `configure_model` may shard them, and no more."


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
    given = _check_fits(weights, parameters | buffers)
    memo: dict[int, object] = {
        id(one): nn.Parameter(given[name], one.requires_grad) for name, one in parameters.items()
    }
    memo |= {id(one): given[name] for name, one in buffers.items()}
    return copy.deepcopy(skeleton, memo)


def _check_fits(weights: WholeWeights, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check that whole tensors have the names and shapes of a module's parameters and buffers.

    Returns:
        All tensors of `weights` by name.

    Raises:
        ValueError: they have not, or they are another process' (on the `meta` device).
    """
    given: dict[str, Tensor] = weights.parameters | weights.buffers | weights.counters
    if differing := sorted(given.keys() ^ targets.keys()):
        raise ValueError(expected("weights", "with the names of the module's tensors", shorten(differing), _BEFORE))
    for name, target in targets.items():
        if given[name].shape != target.shape:
            rule = f"of shape {tuple(target.shape)}"
            raise ValueError(expected(f"weights[{name!r}]", rule, tuple(given[name].shape), _BEFORE))
        if given[name].is_meta:
            remedy = "Gather them with `everywhere=True`."
            raise ValueError(expected(f"weights[{name!r}]", "on this process", "a tensor of another one", remedy))
    return given
