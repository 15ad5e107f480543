"""Weighted sums of recorded deltas, layer group by layer group: bounded memory, several threads, one result.

A layer's sum is formed by one thread, in float64 and in ascending order of steps, so the result does not depend on the
number of threads, on the grouping, or on the order in which the steps are given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.functional.pruning import Keep, Pruning, kept_count
from lightning_unlearn.store.addition import Piece, add_encoded
from lightning_unlearn.store.codec import EncodedLayer, decode_layer
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.opening import corrupted
from lightning_unlearn.store.reader import StepPart
from lightning_unlearn.store.records import encoded_layers
from lightning_unlearn.types import LayerDelta, LayerInfo
from lightning_unlearn.utilities.checks import check_positive_int, expected

__all__ = ["layer_sums", "prune"]

T = TypeVar("T")

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


def _chunks(store: DeltaStore, steps: Sequence[int]) -> Iterator[list[tuple[int, StepPart]]]:
    """Neighbouring steps with what each rank stored of them, every checksum checked."""
    chunk: list[tuple[int, StepPart]] = []
    size, names = 0, set[str]()
    for step in steps:
        parts = store.reader.parts(step)
        chunk += [(step, part) for part in parts]
        size += sum(len(part.step.payload) for part in parts)
        names.update(part.file for part in parts)
        if size >= _CHUNK_BYTES or len(names) >= _CHUNK_FILES:
            yield chunk
            chunk, size, names = [], 0, set()
    if chunk:
        yield chunk


def _add_pruned(total: Tensor, pieces: Sequence[tuple[int, Piece]], pruning: Pruning, name: str) -> None:
    for step, (layer, amount) in pieces:
        delta = prune(decode_layer(layer, total.numel()), total.numel(), pruning, name, step)
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

    def __init__(self, store: DeltaStore, layers: set[int], amounts: Mapping[int, float], pruning: Pruning) -> None:
        self._signature = store.signature
        self._layers = layers
        self._amounts = amounts
        self._pruning = pruning
        self.totals: dict[int, Tensor] = {}

    def decode(self, step: int, part: StepPart) -> list[EncodedLayer]:
        """The layers of this group in a part of a step."""
        try:
            return encoded_layers(part.step, self._signature, part.compression, self._layers)
        except ValueError as error:
            raise corrupted(part.file, [step], error) from error

    def add(self, number: int, pieces: Sequence[tuple[int, StepPart, EncodedLayer]]) -> None:
        """Add the changes of one layer, in the order of the steps."""
        info, total = self._signature.layers[number], self.totals[number]
        amounts = [(layer, self._amounts[step]) for step, _, layer in pieces]
        try:
            if self._pruning.when == "sum" or self._pruning.fraction_of(info.name) == 1.0:
                add_encoded(total, amounts)
            else:
                numbered = [(step, piece) for (step, _, _), piece in zip(pieces, amounts, strict=True)]
                _add_pruned(total, numbered, self._pruning, info.name)
        except ValueError as error:
            raise corrupted(pieces[0][1].file, [step for step, _, _ in pieces], error) from error

    def results(self) -> dict[str, Tensor]:
        """Name -> finished sum, which is let go of here."""
        totals, self.totals = self.totals, {}
        layers = self._signature.layers
        if self._pruning.when == "sum":
            for number, total in totals.items():
                _prune_sum(total, self._pruning, layers[number].name)
        return {layers[number].name: totals[number].reshape(layers[number].shape) for number in sorted(totals)}

    def start(self, chunk: Sequence[tuple[int, StepPart]], workers: _Workers) -> Callable[[], object]:
        """Begin to add a chunk; what is returned waits for the end."""
        steps, parts = zip(*chunk, strict=True)
        of_layer: defaultdict[int, list[tuple[int, StepPart, EncodedLayer]]] = defaultdict(list)
        for step, part, layers in zip(steps, parts, workers.start(self.decode, steps, parts)(), strict=True):
            for layer in layers:
                if of_layer[layer.layer] and of_layer[layer.layer][-1][0] == step:
                    raise corrupted(part.file, [step], f"layer {layer.layer} twice")
                of_layer[layer.layer].append((step, part, layer))
        for number in of_layer:
            if number not in self.totals:
                self.totals[number] = torch.zeros(self._signature.layers[number].numel, dtype=torch.float64)
        largest_first = sorted(of_layer, key=lambda number: -sum(layer.kept for _, _, layer in of_layer[number]))
        return workers.start(self.add, largest_first, [of_layer[number] for number in largest_first])


def layer_sums(
    store: DeltaStore,
    amounts: Mapping[int, float],
    *,
    keep: Keep = None,
    kinds: Collection[str] = ("parameter",),
    memory_bytes: int | None = None,
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

    Yields:
        Name -> float64 tensor of the layer's shape, for the layers of the group that changed in one of the steps.

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
    steps = sorted(amounts)
    with _pool() as executor:
        workers = _Workers(executor)
        for numbers in _groups(layers, memory_bytes):
            group, finish = _Group(store, numbers, amounts, pruning), None
            for chunk in _chunks(store, steps):  # the next chunk is read while this one is added
                if finish is not None:
                    finish()
                finish = group.start(chunk, workers)
            if finish is not None:
                finish()
            yield group.results()
