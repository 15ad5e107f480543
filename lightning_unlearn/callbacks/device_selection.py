"""What of a step's change is kept, decided on an accelerator and read later: the training thread never waits for it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_unlearn.callbacks.captured_layers import Layer, difference
from lightning_unlearn.callbacks.in_flight import InFlight, Row, Slot
from lightning_unlearn.functional.packed_selection import largest_packed
from lightning_unlearn.functional.pruning import kept_count, random_entries
from lightning_unlearn.types import RecordingSettings

__all__ = ["DeviceSelection"]

_DEPTH = 3


class DeviceSelection:
    """Queues the selection on the current stream, and the copy of its result to pinned memory on a stream beside it.

    Memory on the device, with `keep` of every layer: 4 bytes for each entry of the largest layer for its difference
    (of all layers with `scope="global"`), about 22 more for each of its entries while it is selected from, and
    3 x 8 x `keep` bytes for each parameter in the ring of results; the same ring once more in pinned host memory. The
    previous weights, which are the caller's, come on top. At `keep=1.0` a value has no position: 3 x 4 bytes.

    Args:
        device: Where the weights are. Without streams (on a CPU) everything happens at once, in the same way.
        settings: What is kept.
        seed: For `criterion="random"`.
    """

    def __init__(self, device: torch.device, settings: RecordingSettings, *, seed: int) -> None:
        self._device = device
        self._settings = settings
        self._seed = seed
        self._scratch = torch.empty(0, device=device)
        self._slots = [Slot(device) for _ in range(_DEPTH)]
        self._turn = itertools.cycle(self._slots)

    @torch.no_grad()
    def start(
        self, layers: Sequence[Layer], buffers: Sequence[Layer], step: int, measure: bool, edited: Tensor | None
    ) -> InFlight:
        """Begin with one step; its result can be asked for at any time and on any thread.

        Waits only where `_DEPTH` steps are under way, for the oldest of them.

        Args:
            layers: Parameters of the optimizer that stepped, all on the device.
            buffers: Float buffers, kept whole.
            step: The step's ordinal.
            measure: Whether to form the squares as well.
            edited: Boolean scalar on the device that comes back with the result.
        """
        if self._settings.scope == "global":
            rows = [self._global_row(layers)] if layers else []
        else:
            rows = [Row((layer,), layer.tensor.numel(), layer.kept) for layer in layers]
        rows += [Row((layer,), layer.tensor.numel(), layer.tensor.numel(), buffer=True) for layer in buffers]
        slot = next(self._turn)
        slot.prepare(rows)
        self._reserve(max((row.numel for row in rows if not row.whole), default=0))
        for number, row in enumerate(rows):
            self._queue(row, slot, number, step, measure)
        if edited is not None:
            slot.near.edited.copy_(edited)
        return slot.send(rows, step)

    def _global_row(self, layers: Sequence[Layer]) -> Row:
        numel = sum(layer.tensor.numel() for layer in layers)
        return Row(tuple(layers), numel, kept_count(numel, self._settings.keep))

    def _reserve(self, numel: int) -> None:
        # The stream runs in order, so that one layer's difference may overwrite the one before it.
        if self._scratch.numel() < numel:
            self._scratch = torch.empty(numel, device=self._device)

    def _queue(self, row: Row, slot: Slot, number: int, step: int, measure: bool) -> None:
        near, place = slot.near, slice(row.start, row.start + row.kept)
        change = near.values[place] if row.whole else self._scratch[: row.numel]
        start = 0
        for layer in row.layers:
            stop = start + layer.tensor.numel()
            difference(layer, change[start:stop])
            start = stop
        torch.all(torch.isfinite(change), out=near.finite[number])
        squares = near.squares if measure and not row.buffer else None
        if row.whole:
            near.counts[number].copy_(torch.count_nonzero(change))
            if squares is not None:
                squares[1] += torch.linalg.vector_norm(change, dtype=torch.float64).square()
        elif self._settings.criterion == "random":
            entropy = (
                (self._seed, step) if self._settings.scope == "global" else (self._seed, step, row.layers[0].number)
            )
            row.drawn = random_entries(row.numel, row.kept, entropy)
            drawn = row.drawn.to(self._device, non_blocking=True)
            torch.index_select(change, 0, drawn, out=near.values[place])
            near.counts[number].copy_(torch.count_nonzero(change))
            if squares is not None:
                total = torch.linalg.vector_norm(change, dtype=torch.float64).square()
                change.index_fill_(0, drawn, 0.0)
                dropped = torch.linalg.vector_norm(change, dtype=torch.float64).square()
                squares += torch.stack((dropped, total))
        else:
            largest_packed(change, row.kept, near.positions[place], near.values[place], near.counts[number], squares)
