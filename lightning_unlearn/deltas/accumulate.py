"""The weighted sum of recorded deltas."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lightning_unlearn.functional.pruning import keep_of, kept_count, largest_entries
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.lineage import Keep
from lightning_unlearn.types import LayerDelta

__all__ = ["accumulate", "prune"]


def prune(delta: LayerDelta, numel: int, keep: float) -> LayerDelta:
    """The largest entries of a layer's stored change, `ceil(keep * numel)` of them, or all where fewer are stored.

    >>> prune(LayerDelta(0, torch.tensor([2, 5, 7]), torch.tensor([1.0, -3.0, 2.0])), 8, 0.25)
    LayerDelta(layer=0, indices=tensor([5, 7]), values=tensor([-3.,  2.]))
    """
    count = kept_count(numel, keep)
    if count >= delta.values.numel():
        return delta
    chosen = largest_entries(delta.values, count)
    indices = chosen if delta.indices is None else delta.indices[chosen]
    return LayerDelta(delta.layer, indices, delta.values[chosen])


def accumulate(
    store: DeltaStore,
    amounts: Mapping[int, float],
    *,
    keep: Keep = None,
    kinds: Collection[str] = ("parameter",),
) -> dict[str, Tensor]:
    """Sum of `amount * delta` over steps, in float64 and in ascending order of steps, whatever order they come in.

    Exact up to float64 rounding for what the store holds; one step is in memory at a time.

    Args:
        store: The store.
        amounts: Step -> factor.
        keep: Prune every stored delta further, layer by layer: a fraction, or pattern (`fnmatch`) -> fraction, where
            the first match wins and layers without a match stay as they are.
        kinds: Which kinds of layers to sum: `"parameter"`, `"buffer"`.

    Returns:
        Name -> float64 tensor of the layer's shape, for every layer that changed in one of the steps.

    Raises:
        MissingDeltaError: a step has no delta.
        StoreCorruptedError: a delta is damaged.
    """
    sums: dict[str, Tensor] = {}
    for step in sorted(amounts):
        for name, stored in store.read(step).items():
            info = store.signature.layers[stored.layer]
            if info.kind not in kinds:
                continue
            fraction = keep_of(name, 1.0, keep) if isinstance(keep, Mapping) else keep
            delta = stored if fraction is None or fraction == 1.0 else prune(stored, info.numel, fraction)
            if name not in sums:
                sums[name] = torch.zeros(info.numel, dtype=torch.float64)
            total = sums[name]
            if delta.indices is None:
                total.add_(delta.values.double(), alpha=amounts[step])
            else:
                total.index_add_(0, delta.indices, delta.values.double(), alpha=amounts[step])
    shapes = {layer.name: layer.shape for layer in store.signature.layers}
    return {name: total.reshape(shapes[name]) for name, total in sums.items()}
