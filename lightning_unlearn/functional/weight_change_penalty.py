r"""The squared distance of weights to an anchor, as one differentiable step over all tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import check_positive, expected
from lightning_unlearn.utilities.sharded import global_sums, local_part

__all__ = ["weight_change_penalty"]

_CHUNK = 2**22
"""Entries whose differences are held at once in the forward pass."""


def weight_change_penalty(parameters: Sequence[Tensor], anchors: Sequence[Tensor], strength: float = 1.0) -> Tensor:
    r"""The penalty :math:`\lambda \lVert w - w_0 \rVert_2^2` over some tensors; gradient :math:`2\lambda(w - w_0)`.

    One autograd function with foreach arithmetic: value and gradient equal those of the formula written out. The
    forward pass needs memory for a few million entries; the backward pass needs that of the gradients it returns, which
    autograd adds to the loss's own. It can be differentiated twice.

    Args:
        parameters: Tensors of any shapes. Sharded ones (`DTensor`) give the value of the whole on every process, by one
            small all-reduce, so every process has to call this.
        anchors: Constants of the same shapes, devices and dtypes; of a sharded parameter this process's part.
        strength: :math:`\lambda`.

    Returns:
        A scalar in the widest dtype among the parameters, at least float32.

    Raises:
        ValueError: there is no parameter, numbers or shapes differ, or `strength` is out of range.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> penalty = weight_change_penalty([w], [torch.tensor([1.0, 0.0])], strength=0.5)
    >>> penalty.backward()
    >>> penalty.item(), w.grad
    (2.0, tensor([0., 2.]))
    """
    check_positive("strength", strength, zero=True)
    if not parameters or len(parameters) != len(anchors):
        rule = f"one for each of the {len(parameters)} parameters, at least one"
        raise ValueError(expected("anchors", rule, f"{len(anchors)} of them"))
    local = [local_part(parameter) for parameter in parameters]
    for parameter, anchor in zip(local, anchors, strict=True):
        if parameter.shape != anchor.shape:
            raise ValueError(expected("anchors", f"of the shape {tuple(parameter.shape)}", tuple(anchor.shape)))
    result: Tensor = _SquaredDistance.apply(strength, list(anchors), list(parameters), *local)
    return result


class _SquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, strength: float, anchors: list[Tensor], whole: Sequence[Tensor], *parameters: Tensor
    ) -> Tensor:
        ctx.strength, ctx.anchors = strength, anchors
        # Saved rather than held, so that autograd notices where somebody changes a parameter before the backward pass.
        ctx.save_for_backward(*parameters)
        sums: list[Tensor] = []
        for piece in _chunks(parameters):
            differences = torch._foreach_sub(list(parameters[piece]), anchors[piece])
            wide = [torch.promote_types(one.dtype, torch.float32) for one in differences]
            norms = [torch.linalg.vector_norm(one, dtype=dtype) for one, dtype in zip(differences, wide, strict=True)]
            sums += [norm.square() for norm in norms]
        sums = global_sums(sums, whole)
        dtype = sums[0].dtype
        for one in sums:
            dtype = torch.promote_types(dtype, one.dtype)
        return strength * torch.stack([one.to(sums[0].device, dtype) for one in sums]).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors
        scale = 2 * ctx.strength * gradient
        if torch.is_grad_enabled():  # to be differentiated once more, which in-place arithmetic is not
            pairs = zip(parameters, ctx.anchors, strict=True)
            return (None, None, None, *((scale * (one - anchor)).to(one.dtype) for one, anchor in pairs))
        differences = torch._foreach_sub(list(parameters), ctx.anchors)
        torch._foreach_mul_(differences, scale)
        return (None, None, None, *differences)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Consecutive pieces of few entries, each of at least one tensor."""
    start = entries = 0
    for place, tensor in enumerate(tensors):
        if entries and entries + tensor.numel() > _CHUNK:
            yield slice(start, place)
            start, entries = place, 0
        entries += tensor.numel()
    yield slice(start, len(tensors))
