"""Weighted sums of recorded deltas, layer group by layer group: bounded memory, several threads, one result.

A layer's sum is formed by one thread, in float64 and in ascending order of steps, so the result does not depend on the
number of threads, on the grouping, or on the order in which the steps are given.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.functional.pruning import Keep, Pruning, kept_count
from lightning_unlearn.store.addition import Piece, add_encoded
from lightning_unlearn.store.codec import EncodedLayer, decode_layer
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.layout import add_piece, join_pieces, with_pieces
from lightning_unlearn.store.opening import corrupted
from lightning_unlearn.store.reader import StepPart
from lightning_unlearn.store.records import encoded_layers
from lightning_unlearn.types import LayerDelta, LayerInfo, LayerPiece
from lightning_unlearn.utilities.checks import check_positive_int, expected

__all__ = ["Span", "layer_sums", "prune"]

T = TypeVar("T")
Span: TypeAlias = tuple[int, int]
"""First entry of a layer, and one behind the last, in row-major order."""

Found: TypeAlias = tuple[int, StepPart, EncodedLayer]
"""A step, the part of it that one rank recorded, and the change of one layer, or of a piece of it, in there."""

_CHUNK_BYTES = 2**26  # payload of neighbouring steps that is added together
_CHUNK_FILES = 64  # files that a chunk keeps open
_FLOAT64 = 8


def prune(delta: LayerDelta, numel: int, pruning: Pruning, name: str, step: int) -> LayerDelta:
    """What is kept of a layer's stored change: `ceil(fraction * numel)` entries, or all where fewer are stored.

    >>> delta = LayerDelta(0, torch.tensor([2, 5, 7]), torch.tensor([1.0, -3.0, 2.0]))
    >>> prune(delta, 8, Pruning(0.25), "head.bias", 0)
    LayerDelta(layer=0, indices=tensor([5, 7]), values=tensor([-3.,  2.]))
    """
    count = kept_count(numel, pruning.fraction_of(name))
    if count >= delta.values.numel():
        return delta
    chosen = pruning.positions(delta.values, count, name, step)
    indices = chosen if delta.indices is None else delta.indices[chosen]
    return LayerDelta(delta.layer, indices, delta.values[chosen])


def _prune_sum(total: Tensor, pruning: Pruning, name: str) -> None:
    """Set to zero what is not kept of a layer's sum."""
    count = kept_count(total.numel(), pruning.fraction_of(name))
    if count < total.numel():
        chosen = pruning.positions(total, count, name)
        kept = total[chosen]
        total.zero_()[chosen] = kept


def _groups(layers: Sequence[tuple[int, LayerInfo]], memory_bytes: int | None) -> Iterator[set[int]]:
    group: set[int] = set()
    size = 0
    for number, info in layers:
        size += _FLOAT64 * info.numel
        if group and memory_bytes is not None and size > memory_bytes:
            yield group
            group, size = set(), _FLOAT64 * info.numel
        group.add(number)
    if group:
        yield group


def _chunks(
    store: DeltaStore, steps: Sequence[int], numbers: Collection[int] | None
) -> Iterator[list[tuple[int, StepPart]]]:
    """Neighbouring steps with what each rank stored of them, every checksum checked; of these layers and pieces."""
    chunk: list[tuple[int, StepPart]] = []
    size, names = 0, set[str]()
    for step in steps:
        parts = store.reader.parts(step, numbers)
        chunk += [(step, part) for part in parts]
        size += sum(len(part.step.payload) for part in parts)
        names.update(part.file for part in parts)
        if size >= _CHUNK_BYTES or len(names) >= _CHUNK_FILES:
            yield chunk
            chunk, size, names = [], 0, set()
    if chunk:
        yield chunk


def _add_delta(total: Tensor, delta: LayerDelta, amount: float) -> None:
    if delta.indices is None:
        total.add_(delta.values.double(), alpha=amount)
    else:
        total.index_add_(0, delta.indices, delta.values.double(), alpha=amount)


class _Workers:
    """Runs functions over items, beside the caller where torch may use several threads."""

    def __init__(self, executor: Executor | None) -> None:
        self._executor = executor

    def start(self, function: Callable[..., T], *items: Sequence[object]) -> Callable[[], list[T]]:
        if self._executor is None:
            results = list(map(function, *items))
            return lambda: results
        futures: list[Future[T]] = [self._executor.submit(function, *item) for item in zip(*items, strict=True)]
        return lambda: [future.result() for future in futures]


def _pool() -> AbstractContextManager[Executor | None]:
    threads = torch.get_num_threads()
    if threads == 1:
        return nullcontext()
    # every thread is one of torch's, so none of them may have more: the setting holds for a thread
    return ThreadPoolExecutor(threads, "layer-sums", initializer=torch.set_num_threads, initargs=(1,))


class _Group:
    """Sums of some layers, to which chunks of steps are added."""

    def __init__(
        self,
        store: DeltaStore,
        layers: set[int],
        amounts: Mapping[int, float],
        pruning: Pruning,
        spans: Mapping[str, Span],
    ) -> None:
        self._layers = store.signature.layers
        self._pieces = store.pieces
        self._numbered = with_pieces(store.signature, self._pieces)
        self._amounts = amounts
        self._pruning = pruning
        self._asked = {number: spans.get(self._layers[number].name) for number in layers}
        # What is pruned further is chosen from the whole layer.
        self._spans = {
            number: (0, self._layers[number].numel) if span is None or self._is_pruned(number) else span
            for number, span in self._asked.items()
        }
        cut = {number for number, piece in enumerate(self._pieces, len(self._layers)) if self._touches(piece)}
        self.wanted = {number for number, (start, stop) in self._spans.items() if start < stop} | cut
        self.totals: dict[int, Tensor] = {}

    def _is_pruned(self, number: int) -> bool:
        return self._pruning.fraction_of(self._layers[number].name) < 1.0

    def _touches(self, piece: LayerPiece) -> bool:
        start, stop = self._spans.get(piece.layer, (0, 0))
        return piece.start < stop and start < piece.stop

    def _piece(self, number: int) -> LayerPiece | None:
        """The piece of that number; `None` for a layer."""
        return None if number < len(self._layers) else self._pieces[number - len(self._layers)]

    def _layer(self, number: int) -> int:
        piece = self._piece(number)
        return number if piece is None else piece.layer

    def decode(self, step: int, part: StepPart) -> list[EncodedLayer]:
        """The layers of this group, and their pieces, in a part of a step."""
        try:
            return encoded_layers(part.step, self._numbered, part.compression, self.wanted)
        except ValueError as error:
            raise corrupted(part.file, [step], error) from error

    def add(self, number: int, found: Sequence[Found]) -> None:
        """Add the changes of one layer, in the order of the steps."""
        info = self._layers[number]
        try:
            if self._pruning.when == "sum" or not self._is_pruned(number):
                by_piece: defaultdict[int, list[Piece]] = defaultdict(list)
                for step, _, layer in found:
                    by_piece[layer.layer].append((layer, self._amounts[step]))
                for piece, changes in by_piece.items():
                    self._add(number, self._piece(piece), changes)
            else:
                for step, group in itertools.groupby(found, key=lambda one: one[0]):
                    delta = prune(self._joined(info, group), info.numel, self._pruning, info.name, step)
                    _add_delta(self.totals[number], delta, self._amounts[step])
        except ValueError as error:
            raise corrupted(found[0][1].file, [step for step, _, _ in found], error) from error

    def _add(self, number: int, piece: LayerPiece | None, changes: Sequence[Piece]) -> None:
        total, (start, stop) = self.totals[number], self._spans[number]
        numel = self._layers[number].numel
        held = LayerPiece(number, 0, (numel,), (1,)) if piece is None else piece
        if held.is_run and start <= held.start and held.stop <= stop:
            add_encoded(total[held.start - start : held.stop - start], changes)
            return
        part = torch.zeros(held.numel, dtype=torch.float64)
        add_encoded(part, changes)
        if held.is_run:
            first, last = max(start, held.start), min(stop, held.stop)
            total[first - start : last - start] += part[first - held.start : last - held.start]
        elif start <= held.start and held.stop <= stop:
            add_piece(total, replace(held, start=held.start - start), part)
        else:
            whole = torch.zeros(numel, dtype=torch.float64)
            add_piece(whole, held, part)
            total += whole[start:stop]

    def _joined(self, info: LayerInfo, found: Iterable[Found]) -> LayerDelta:
        parts = [
            (self._piece(layer.layer), decode_layer(layer, self._numbered.layers[layer.layer].numel))
            for _, _, layer in found
        ]
        cut = [(piece, delta) for piece, delta in parts if piece is not None]
        if cut and len(cut) < len(parts):
            raise ValueError(f"layer {info.name} whole and in pieces")
        return join_pieces(info, cut) if cut else parts[0][1]

    def results(self) -> dict[str, Tensor]:
        """Name -> finished sum, which is let go of here."""
        totals, self.totals = self.totals, {}
        if self._pruning.when == "sum":
            for number, total in totals.items():
                _prune_sum(total, self._pruning, self._layers[number].name)
        return {self._layers[number].name: self._as_asked(number, totals[number]) for number in sorted(totals)}

    def _as_asked(self, number: int, total: Tensor) -> Tensor:
        asked, (start, _) = self._asked[number], self._spans[number]
        if asked is None:
            return total.reshape(self._layers[number].shape)
        return total[asked[0] - start : asked[1] - start]

    def start(self, chunk: Sequence[tuple[int, StepPart]], workers: _Workers) -> Callable[[], object]:
        """Begin to add a chunk; what is returned waits for the end."""
        steps, parts = zip(*chunk, strict=True)
        of_layer: defaultdict[int, list[Found]] = defaultdict(list)
        seen: set[tuple[int, int]] = set()
        for step, part, layers in zip(steps, parts, workers.start(self.decode, steps, parts)(), strict=True):
            for layer in layers:
                if (step, layer.layer) in seen:
                    raise corrupted(part.file, [step], f"layer {layer.layer} twice")
                seen.add((step, layer.layer))
                of_layer[self._layer(layer.layer)].append((step, part, layer))
        for number in of_layer:
            if number not in self.totals:
                start, stop = self._spans[number]
                self.totals[number] = torch.zeros(stop - start, dtype=torch.float64)
        largest_first = sorted(of_layer, key=lambda number: -sum(layer.kept for _, _, layer in of_layer[number]))
        return workers.start(self.add, largest_first, [of_layer[number] for number in largest_first])


def layer_sums(
    store: DeltaStore,
    amounts: Mapping[int, float],
    *,
    keep: Keep = None,
    kinds: Collection[str] = ("parameter",),
    memory_bytes: int | None = None,
    spans: Mapping[str, Span] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Sums of `amount * delta` over steps, for one group of layers after the other.

    Exact up to float64 rounding for what the store holds, and deterministic. Once the first group is there, every
    touched byte has been read and checked.

    Args:
        store: The store.
        amounts: Step -> factor.
        keep: Prune every stored delta further, layer by layer: a fraction, or pattern (`fnmatch`) -> fraction, where
            the first match wins and layers without a match stay as they are; or, as a `Pruning` says, their sum.
        kinds: Which kinds of layers to sum: `"parameter"`, `"buffer"`.
        memory_bytes: Bound on the bytes of the sums of a group, 8 for each entry; a layer that needs more is a group
            of its own. Each group reads the steps once more; from uncompressed stores only the bytes of its layers.
            Beside the sums there are at most two chunks of neighbouring steps of 64 MiB, and decoding room for each
            of torch's threads.
        spans: Name -> first entry of the layer and one behind the last, in row-major order, where not all of it is
            wanted: what was recorded of other entries, in pieces of their own, is not read.

    Yields:
        Name -> float64 tensor of the layer's shape, or of shape (stop - start,) for a span, for the layers of the group
        that changed in one of the steps.

    Raises:
        MissingDeltaError: a step has no delta.
        StoreCorruptedError: a delta is damaged.
        MissingRequirementError: the sum is to be pruned, of deltas that were pruned while recording.
        ValueError: `memory_bytes` is no positive integer, or a fraction of `keep` is out of range.
    """
    pruning = Pruning.of(keep)
    if pruning.when == "sum" and not store.settings.is_dense:
        rule, remedy = 'recorded with keep=1.0 to prune the sum (`prune="sum"`)', 'Use `prune="step"`.'
        raise MissingRequirementError(expected("store", rule, f"keep={store.settings.keep}", remedy))
    if memory_bytes is not None:
        check_positive_int("memory_bytes", memory_bytes)
    layers = [(number, info) for number, info in enumerate(store.signature.layers) if info.kind in kinds]
    steps, limits = sorted(amounts), {} if spans is None else spans
    with _pool() as executor:
        workers = _Workers(executor)
        for numbers in _groups(layers, memory_bytes):
            group, finish = _Group(store, numbers, amounts, pruning, limits), None
            wanted = None if spans is None else group.wanted
            for chunk in _chunks(store, steps, wanted):  # the next chunk is read while this one is added
                if finish is not None:
                    finish()
                finish = group.start(chunk, workers)
            if finish is not None:
                finish()
            yield group.results()
