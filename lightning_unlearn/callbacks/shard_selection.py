"""What of a step's change is kept where layers are in pieces on several processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_unlearn.callbacks.captured_layers import Layer, difference, not_finite, whole_layer
from lightning_unlearn.functional.pruning import kept_count, random_entries
from lightning_unlearn.functional.shard_selection import NotFiniteError, Reductions, select_shards
from lightning_unlearn.store.layout import places_in_layer
from lightning_unlearn.types import LayerDelta, RecordingSettings

__all__ = ["ShardSelection"]

Squares = tuple[float, float]


class ShardSelection:
    """Selects the same entries as one process would that had all pieces, and gives this process' share of them.

    A threshold of a layer takes three reductions over all processes, for all layers of a step together (see
    `functional.shard_selection`); keeping everything, and drawing at random, take one, by which all are told of a
    change that is not finite. The training waits for these and for the counts of what was found, on a CUDA device too.

    Memory, where the weights are: 4 bytes for each entry that this process records, for the changes of a step, and
    about 13 for each entry of its largest piece while that is selected from.

    Args:
        settings: What is kept.
        names: Names of all layers, by number.
        numel: Number of entries of all layers, by number.
        reductions: What the processes do together.
        seed: For `criterion="random"`.
    """

    def __init__(
        self,
        settings: RecordingSettings,
        names: Sequence[str],
        numel: Sequence[int],
        reductions: Reductions,
        *,
        seed: int,
    ) -> None:
        self._settings = settings
        self._names = names
        self._numel = numel
        self._reductions = reductions
        self._seed = seed
        self._scratch = torch.empty(0)

    def select(
        self, held: Mapping[int, int], layers: Mapping[int, Layer], step: int, measure: bool
    ) -> tuple[list[LayerDelta], Squares]:
        """Kept entries by layer or piece, without those that did not change; and the squares, zeros unless measured.

        Every process calls it after the same step, also one that records nothing of its layers.

        Args:
            held: Number of each layer of the optimizer -> how many of its entries are kept; the same on all processes.
            layers: Those of which this process records something, by number of the layer.
            step: The step's ordinal.
            measure: Whether to form the squares as well, of what this process records.

        Raises:
            LightningUnlearnError: a change is not finite; on every process.
        """
        changes = self._changes(layers)
        chosen = self._chosen(held, layers, changes, step)
        deltas: list[LayerDelta] = []
        dropped = total = 0.0
        for number in sorted(layers):
            change, positions = changes[number], chosen[number]
            delta = self._delta(layers[number], change, positions)
            if measure:
                total += float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
                if positions is not None:
                    rest = change.index_fill_(0, positions, 0.0)  # scratch, of which the delta has a copy
                    dropped += float(torch.linalg.vector_norm(rest, dtype=torch.float64)) ** 2
            if delta is not None:
                deltas.append(delta)
        return sorted(deltas, key=lambda one: one.layer), (dropped, total)

    def _changes(self, layers: Mapping[int, Layer]) -> dict[int, Tensor]:
        sizes = {number: layer.value.numel() for number, layer in layers.items()}
        device = next((layer.value.device for layer in layers.values()), self._scratch.device)
        if self._scratch.numel() < sum(sizes.values()) or self._scratch.device != device:
            self._scratch = torch.empty(sum(sizes.values()), device=device)
        changes, start = {}, 0
        for number, layer in sorted(layers.items()):
            changes[number] = difference(layer, self._scratch[start : start + sizes[number]])
            start += sizes[number]
        return changes

    def _chosen(
        self, held: Mapping[int, int], layers: Mapping[int, Layer], changes: Mapping[int, Tensor], step: int
    ) -> dict[int, Tensor | None]:
        """Positions in what this process records of each layer, ascending; `None` for everything."""
        settings, numbers = self._settings, sorted(held)
        if settings.scope == "global":
            size = sum(self._numel[number] for number in numbers)
            count = kept_count(size, settings.keep)
            if settings.criterion == "random":
                self._check_finite(numbers, changes, step)
                return self._drawn_globally(numbers, layers, random_entries(size, count, (self._seed, step)))
            rows = [[changes[number] for number in numbers if number in changes]]
            found = self._select(rows, [count], size, ["one of the layers"], step)[0]
            return dict(zip((number for number in numbers if number in changes), found, strict=True))
        pruned = [number for number in numbers if held[number] < self._numel[number]]
        if settings.criterion == "random" or not pruned:
            self._check_finite(numbers, changes, step)
            return {
                number: self._drawn(number, held[number], layers[number], step) if number in pruned else None
                for number in changes
            }
        # Layers that are kept whole take part, so that what is not finite in them is told to all.
        rows = [[changes[number]] if number in changes else [] for number in numbers]
        largest = max(self._numel[number] for number in numbers)
        names = [self._names[number] for number in numbers]
        selected = self._select(rows, [held[number] for number in numbers], largest, names, step)
        return {
            number: row[0] if number in pruned else None
            for number, row in zip(numbers, selected, strict=True)
            if number in changes
        }

    def _select(
        self, rows: list[list[Tensor]], kept: list[int], largest: int, names: Sequence[str], step: int
    ) -> list[list[Tensor]]:
        try:
            return select_shards(rows, kept, self._reductions, numel=largest, device=self._scratch.device)
        except NotFiniteError as error:
            raise not_finite(names[error.row], step) from error

    def _check_finite(self, numbers: Sequence[int], changes: Mapping[int, Tensor], step: int) -> None:
        flags = torch.zeros(len(numbers), dtype=torch.int32, device=self._scratch.device)
        for place, number in enumerate(numbers):
            if number in changes:
                flags[place] = (~torch.isfinite(changes[number])).any()
        broken = self._reductions.total(flags).nonzero()
        if broken.numel():
            raise not_finite(self._names[numbers[int(broken[0])]], step)

    def _drawn(self, number: int, kept: int, layer: Layer, step: int) -> Tensor:
        places = random_entries(self._numel[number], kept, (self._seed, step, number))
        return self._within(layer, places)

    def _drawn_globally(
        self, numbers: Sequence[int], layers: Mapping[int, Layer], places: Tensor
    ) -> dict[int, Tensor | None]:
        found: dict[int, Tensor | None] = {}
        start = 0
        for number in numbers:
            stop = start + self._numel[number]
            if number in layers:
                found[number] = self._within(layers[number], places[(places >= start) & (places < stop)] - start)
            start = stop
        return found

    def _within(self, layer: Layer, places: Tensor) -> Tensor:
        """Where in the piece the places of the layer are, of those that are in there."""
        if layer.piece is None:
            return places.to(torch.int64).to(self._scratch.device)
        own = places_in_layer(layer.piece, torch.arange(layer.piece.numel))
        return torch.isin(own, places).nonzero().squeeze(1).to(self._scratch.device)

    @staticmethod
    def _delta(layer: Layer, change: Tensor, positions: Tensor | None) -> LayerDelta | None:
        if positions is None:
            delta = whole_layer(layer.number, change)
            if delta is None:
                return None
            indices = None if delta.indices is None else delta.indices.cpu()
            return LayerDelta(layer.number, indices, delta.values.to("cpu", copy=delta.indices is None))
        values = change[positions].cpu()
        return LayerDelta(layer.number, positions.cpu(), values) if bool(torch.count_nonzero(values)) else None
