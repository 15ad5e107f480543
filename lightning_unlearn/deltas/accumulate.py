"""What is done with the weighted sum of recorded deltas: collected, measured, or subtracted straight from tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from lightning_unlearn.deltas.layer_sums import layer_sums
from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.functional.pruning import Keep
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import LayerInfo
from lightning_unlearn.utilities.checks import expected, shorten

__all__ = ["MEMORY_BYTES", "accumulate", "subtract_from", "sum_size"]

MEMORY_BYTES = 2**30
"""Default bound on the float64 sums that are in memory at a time, where they need not all be."""


def accumulate(
    store: DeltaStore,
    amounts: Mapping[int, float],
    *,
    keep: Keep = None,
    kinds: Collection[str] = ("parameter",),
) -> dict[str, Tensor]:
    """Sum of `amount * delta` over steps, in float64 and in ascending order of steps, whatever order they come in.

    Exact up to float64 rounding for what the store holds; see `layer_sums`, whose arguments and errors these are.

    Returns:
        Name -> float64 tensor of the layer's shape, for every layer that changed in one of the steps.
    """
    sums: dict[str, Tensor] = {}
    for group in layer_sums(store, amounts, keep=keep, kinds=kinds):
        sums.update(group)
    return sums


def sum_size(
    store: DeltaStore,
    amounts: Mapping[int, float],
    *,
    keep: Keep = None,
    kinds: Collection[str] = ("parameter",),
    memory_bytes: int = MEMORY_BYTES,
) -> tuple[float, int]:
    """L2 norm of that sum and number of its entries that are not zero, in bounded memory.

    Arguments and errors are those of `layer_sums`.
    """
    squares: list[float] = []
    changed = 0
    for group in layer_sums(store, amounts, keep=keep, kinds=kinds, memory_bytes=memory_bytes):
        for total in group.values():
            changed += int(torch.count_nonzero(total))
            squares.append(float(total.square_().sum()))
    return math.sqrt(math.fsum(squares)), changed


def _check_targets(
    tensors: Mapping[str, Tensor], layers: Collection[LayerInfo], part: Callable[[LayerInfo, Tensor], Tensor] | None
) -> None:
    missing = [layer.name for layer in layers if layer.name not in tensors]
    if missing:
        got = f"none for {shorten(missing)}"
        remedy = "Pass all parameters of the recorded model by name."
        raise StoreMismatchError(expected("tensors", "all layers of the store", got, remedy))
    for layer in layers:
        tensor = tensors[layer.name]
        if not tensor.is_floating_point():
            remedy = "Pass the model's own parameter."
            raise StoreMismatchError(expected(layer.name, "a floating-point tensor", tensor.dtype, remedy))
        if part is None and tuple(tensor.shape) != layer.shape:
            remedy = "Pass the whole layer, or say by `part=` which part of it the tensor holds."
            raise StoreMismatchError(expected(layer.name, f"of shape {layer.shape}", tuple(tensor.shape), remedy))


@torch.no_grad()
def subtract_from(
    tensors: Mapping[str, Tensor],
    store: DeltaStore,
    amounts: Mapping[int, float],
    *,
    keep: Keep = None,
    kinds: Collection[str] = ("parameter",),
    memory_bytes: int = MEMORY_BYTES,
    part: Callable[[LayerInfo, Tensor], Tensor] | None = None,
) -> None:
    """Subtract the sum of `amount * delta` over steps from tensors, in place and in bounded memory.

    Every weight is changed once, by its whole sum, with one rounding from float64. Names, shapes and dtypes, the
    statuses of the steps and all checksums are checked before the first weight changes.

    Args:
        tensors: Name -> tensor of any floating dtype, memory format and device; at least the layers of these kinds.
        store: The store.
        amounts: Step -> factor.
        keep: As in `layer_sums`.
        kinds: As in `layer_sums`.
        memory_bytes: As in `layer_sums`.
        part: What of a layer's sum belongs to the tensor, for tensors that hold a part of the layer (a shard): is
            called with the layer and the sum in the layer's shape.

    Raises:
        StoreMismatchError: a tensor is missing, or has another shape than the layer.
        MissingDeltaError: a step has no delta.
        StoreCorruptedError: a delta is damaged.
    """
    layers = {layer.name: layer for layer in store.signature.layers if layer.kind in kinds}
    _check_targets(tensors, layers.values(), part)
    for group in layer_sums(store, amounts, keep=keep, kinds=kinds, memory_bytes=memory_bytes):
        for name, total in group.items():
            target, change = tensors[name], total if part is None else part(layers[name], total)
            device = torch.device("cpu") if target.device.type == "mps" else target.device  # has no float64
            target.copy_(target.to(device, torch.float64) - change.to(device))
