"""What of a step's change is kept, decided at once: for weights in main memory, and for devices without streams."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.callbacks.captured_layers import Layer, difference, not_finite, whole_layer
from lightning_unlearn.functional.pruning import kept_count, largest_entries, random_entries, split_positions
from lightning_unlearn.functional.selection import Selector
from lightning_unlearn.types import LayerDelta, RecordingSettings
from lightning_unlearn.utilities.distributed import share_out

__all__ = ["HostSelection", "Squares"]

T = TypeVar("T")
Squares = tuple[float, float]
"""Sums of squares of what is dropped, and of everything."""

# Handing work to another thread pays from about this many entries on.
_ENTRIES_PER_THREAD = 1 << 19
_MOST_THREADS = 4


class HostSelection:
    """Selects layer by layer, on as many threads as PyTorch uses; no temporary is of the size of the model.

    Layers of contiguous float32, nearly always all of them, are read and selected from piece by piece, on threads of
    its own: numpy releases the GIL, and PyTorch's threads are idle meanwhile. Others (16-bit weights, channels_last,
    another criterion or scope) first get their difference into reserved scratch.

    Args:
        settings: What is kept.
        seed: For `criterion="random"`.
        share: Whether dense values may be views of scratch that the next step overwrites.
    """

    def __init__(self, settings: RecordingSettings, *, seed: int, share: bool) -> None:
        self._settings = settings
        self._seed = seed
        self._share = share
        self._selectors: list[Selector] = []
        self._threads: ThreadPoolExecutor | None = None
        self._scratch = torch.empty(0)
        self._reserved = 0

    def reserve(self, layer: Layer) -> None:
        """Allocate what this layer needs, before the first step that changes it."""
        n, device = layer.tensor.numel(), layer.tensor.device
        if self._settings.scope == "global":
            self._reserved += n
            self._scratch = torch.empty(self._reserved, device=device)
        elif layer.kept == n:
            layer.scratch = torch.empty(n, device=device)
        elif not self._direct(layer) and (n > self._scratch.numel() or device != self._scratch.device):
            self._scratch = torch.empty(max(n, self._scratch.numel()), device=device)
        if not self._selectors and self._settings.criterion == "magnitude" and not self._settings.is_dense:
            count = max(1, min(_MOST_THREADS, torch.get_num_threads()))
            self._selectors = [Selector() for _ in range(count)]

    def select(self, layers: Sequence[Layer], step: int, measure: bool) -> tuple[list[LayerDelta], Squares]:
        """Kept entries by layer, without layers that did not change; and the squares, zeros unless measured.

        Raises:
            LightningUnlearnError: a change is not finite.
        """
        if self._settings.scope == "global":
            return self._select_globally(layers, step, measure) if layers else ([], (0.0, 0.0))
        direct = [layer for layer in layers if self._direct(layer)]
        chosen = dict(zip((layer.number for layer in direct), self._select_direct(direct, step, measure), strict=True))
        for layer in layers:
            if layer.number not in chosen:
                chosen[layer.number] = self._select_one(layer, step, measure)
        found = [chosen[layer.number] for layer in layers]
        squares = (sum(one[0] for _, one in found), sum(one[1] for _, one in found))
        return [delta for delta, _ in found if delta is not None], squares

    def _direct(self, layer: Layer) -> bool:
        tensor, before = layer.tensor, layer.before
        return (
            self._settings.criterion == "magnitude"
            and self._settings.scope == "layer"
            and layer.kept < tensor.numel()
            and tensor.dtype == torch.float32
            and tensor.device.type == "cpu"
            and tensor.is_contiguous()
            and (before is None or before.is_contiguous())
        )

    def _select_direct(
        self, layers: Sequence[Layer], step: int, measure: bool
    ) -> list[tuple[LayerDelta | None, Squares]]:
        # Tensors become arrays here: the threads are to touch nothing of PyTorch, whose threads they would multiply.
        arrays = [(layer.tensor.detach().view(-1).numpy(), layer.previous.view(-1).numpy()) for layer in layers]

        def select(selector: Selector, place: int) -> tuple[LayerDelta | None, Squares]:
            layer, (after, before) = layers[place], arrays[place]
            try:
                found = selector.select(after, before, layer.kept)
            except ValueError as error:
                raise not_finite(layer.name, step) from error
            squares = selector.squares(after, before, found.positions) if measure else (0.0, 0.0)
            np.copyto(before, after)  # while both are in the cache
            if found.positions.size == 0:
                return None, squares
            return LayerDelta(layer.number, torch.from_numpy(found.positions), torch.from_numpy(found.values)), squares

        return self._on_threads(select, [after.size for after, _ in arrays])

    def _on_threads(self, function: Callable[[Selector, int], T], sizes: Sequence[int]) -> list[T]:
        """`function(selector, place)` for every place, the work shared out by size; each thread has its selector."""
        if not sizes:
            return []
        count = min(len(self._selectors), max(1, sum(sizes) // _ENTRIES_PER_THREAD), len(sizes))
        owners = share_out(sizes, count)
        shares = [[place for place, owner in enumerate(owners) if owner == thread] for thread in range(count)]

        def run(thread: int) -> list[T]:
            return [function(self._selectors[thread], place) for place in shares[thread]]

        if count > 1 and self._threads is None:
            self._threads = ThreadPoolExecutor(len(self._selectors) - 1, "delta-selection")
        others = [self._threads.submit(run, thread) for thread in range(1, count)] if self._threads is not None else []
        try:
            own = run(0)
        finally:
            # Also where this thread failed: nobody may still be writing when the caller goes on.
            for other in others:
                other.exception()
        results = [own, *(other.result() for other in others)]
        by_place = {
            place: one
            for thread, part in zip(shares, results, strict=True)
            for place, one in zip(thread, part, strict=True)
        }
        return [by_place[place] for place in range(len(sizes))]

    def _select_one(self, layer: Layer, step: int, measure: bool) -> tuple[LayerDelta | None, Squares]:
        n = layer.tensor.numel()
        if layer.scratch is not None:
            change = difference(layer, layer.scratch)
        elif self._scratch.numel() >= n and self._scratch.device == layer.tensor.device:
            change = difference(layer, self._scratch[:n])
        else:  # the memory format changed after the layer was reserved
            change = difference(layer, torch.empty(n, device=layer.tensor.device))
        if layer.kept == n:
            self._check_finite(layer, change, step)
            delta = whole_layer(layer.number, change)
            if delta is not None and (delta.indices is not None or not self._share or change.device.type != "cpu"):
                indices = None if delta.indices is None else delta.indices.cpu()
                delta = LayerDelta(layer.number, indices, delta.values.to("cpu", copy=delta.indices is None))
            return delta, (0.0, float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2 if measure else 0.0)
        if self._settings.criterion == "random":
            self._check_finite(layer, change, step)
            positions = random_entries(n, layer.kept, (self._seed, step, layer.number))
            found = bool(torch.count_nonzero(change))
        else:
            try:
                positions = largest_entries(change, layer.kept, self._selectors[0])
            except ValueError as error:
                raise not_finite(layer.name, step) from error
            found = bool(positions.numel())
        squares = self._squares(change, positions) if measure else (0.0, 0.0)
        values = change[positions.to(change.device)].cpu()
        return LayerDelta(layer.number, positions.cpu(), values) if found else None, squares

    def _select_globally(self, layers: Sequence[Layer], step: int, measure: bool) -> tuple[list[LayerDelta], Squares]:
        sizes = [layer.tensor.numel() for layer in layers]
        stops = list(itertools.accumulate(sizes))
        flat = self._scratch[: stops[-1]]
        changes = [flat[stop - size : stop] for size, stop in zip(sizes, stops, strict=True)]
        for layer, change in zip(layers, changes, strict=True):
            if layer.tensor.device == change.device:
                difference(layer, change)
            else:
                change.copy_(difference(layer, torch.empty(change.numel(), device=layer.tensor.device)))
            self._check_finite(layer, change, step)
        count = kept_count(flat.numel(), self._settings.keep)
        if self._settings.criterion == "random":
            positions = random_entries(flat.numel(), count, (self._seed, step))
        elif count == flat.numel():
            positions = torch.nonzero(flat).flatten()
        else:
            positions = largest_entries(flat, count, self._selectors[0])
        deltas = [
            LayerDelta(layer.number, kept.cpu(), change[kept.to(change.device)].cpu())
            for layer, change, kept in zip(layers, changes, split_positions(positions, sizes), strict=True)
            if kept.numel() and torch.count_nonzero(change)
        ]
        return deltas, self._squares(flat, positions) if measure else (0.0, 0.0)

    @staticmethod
    def _squares(change: Tensor, positions: Tensor) -> Squares:
        return Selector().squares(change.cpu().numpy(), None, positions.cpu().numpy())

    @staticmethod
    def _check_finite(layer: Layer, change: Tensor, step: int) -> None:
        # A sum needs no memory; it can only be non-finite without cause where finite values overflow it.
        if not bool(torch.isfinite(change.sum())) and not bool(torch.isfinite(change).all()):
            raise not_finite(layer.name, step)
