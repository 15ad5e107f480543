"""A recording that is planned: which model, for how long, on how many ranks, and what each of them writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

import torch

from lightning_unlearn.functional.pruning import FEW_TRAINABLE, keep_of, kept_count
from lightning_unlearn.types import LayerInfo, ModelSignature, RecordingSettings, ValueDtype
from lightning_unlearn.utilities.checks import check_choice, check_fraction, check_positive_int, expected
from lightning_unlearn.utilities.distributed import share_out

__all__ = ["Piece", "PlannedRecording"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank records of one layer.

    Attributes:
        layer: The layer.
        numel: Entries that this rank looks at.
        kept: How many of them it stores, at most.
        value_dtype: How it writes them.
        itemsize: Bytes of an entry in memory.
    """

    layer: LayerInfo
    numel: int
    kept: int
    value_dtype: ValueDtype
    itemsize: int

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out."""
        return self.kept == self.numel


def _itemsize(layer: LayerInfo) -> int:
    dtype = getattr(torch, layer.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            expected("signature", "layers of real floating-point numbers", f"{layer.dtype} ({layer.name})")
        )
    return dtype.itemsize


def _own_rows(layer: LayerInfo, rank: int, ranks: int) -> int:
    rows = layer.shape[0] if layer.shape else 1
    chunk = -(-rows // ranks)
    return max(0, min(chunk, rows - rank * chunk))


@dataclass(frozen=True)
class PlannedRecording:
    """What is going to be recorded.

    Attributes:
        signature: Layers of the model, with names and shapes.
        settings: What is kept, and how it is written.
        steps: Optimizer steps.
        batch_size: Samples behind a step, over all ranks and accumulated batches.
        frozen: Names of parameters that are not trained.
        samples: Samples of the training set; `None` where unknown.
        ranks: Processes that train.
        sharded: Whether each rank holds a part of every layer (FSDP), and not all of all layers (DDP).
        device: Where the weights are.
        watched: Share of the steps whose delta is stored.
        checkpoints: How often weights are made known: at the end of every epoch and with every checkpoint.
        anchor_every: `anchor_every` of the recorder.
        optimizer_tensors: Tensors of a parameter's size that the optimizer keeps: 1 for momentum, 2 for Adam.
        key_bytes: Mean bytes of a sample's key; `None` for integers.

    Raises:
        ValueError: an argument is out of range, nothing is trained, or a layer is no real floating-point tensor.

    >>> layers = (LayerInfo("weight", (100, 10), "float32"), LayerInfo("bias", (100,), "float32"))
    >>> plan = PlannedRecording(ModelSignature(layers), RecordingSettings(keep=0.1), steps=10, batch_size=8, ranks=2)
    >>> [[(piece.layer.name, piece.kept) for piece in pieces] for pieces in plan.pieces]
    [[('weight', 100)], [('bias', 10)]]
    """

    signature: ModelSignature
    settings: RecordingSettings
    steps: int
    batch_size: int
    frozen: frozenset[str] = field(default_factory=frozenset)
    samples: int | None = None
    ranks: int = 1
    sharded: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    watched: float = 1.0
    checkpoints: int = 1
    anchor_every: int | None = None
    optimizer_tensors: int = 1
    key_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "ranks"):
            check_positive_int(name, getattr(self, name))
        for name in ("checkpoints", "optimizer_tensors"):
            check_positive_int(name, getattr(self, name), zero=True)
        for name in ("samples", "anchor_every", "key_bytes"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        check_fraction("watched", self.watched)
        check_choice("device", self.device, ("cpu", "cuda"))
        if self.sharded and (self.settings.scope, self.settings.criterion) != ("layer", "magnitude"):
            got = f"scope={self.settings.scope!r}, criterion={self.settings.criterion!r}"
            rule, remedy = "scope='layer', criterion='magnitude' where weights are sharded", "Nothing else is modelled."
            raise ValueError(expected("settings", rule, got, remedy))
        if self.sharded and self.anchor_every is not None:
            rule, remedy = "None where weights are sharded", "Use the Trainer's own (distributed) checkpoints instead."
            raise ValueError(expected("anchor_every", rule, self.anchor_every, remedy))
        unknown = sorted(self.frozen - {layer.name for layer in self.parameters})
        if unknown:
            raise ValueError(expected("frozen", "names of parameters", unknown[:5]))
        if not self.itemsizes or not self.trained:
            raise ValueError(expected("signature", "a model of which something is trained", "none", "Unfreeze some."))

    @property
    def parameters(self) -> list[LayerInfo]:
        """All parameters."""
        return [layer for layer in self.signature.layers if layer.kind == "parameter"]

    @property
    def trained(self) -> list[LayerInfo]:
        """Parameters that are trained."""
        return [layer for layer in self.parameters if layer.name not in self.frozen and layer.numel]

    @property
    def buffers(self) -> list[LayerInfo]:
        """Float buffers."""
        return [layer for layer in self.signature.layers if layer.kind == "buffer"]

    @property
    def trainable_share(self) -> float:
        """Share of trained parameters, by number of entries."""
        return sum(layer.numel for layer in self.trained) / sum(layer.numel for layer in self.parameters)

    @property
    def trains_little(self) -> bool:
        """Whether so few parameters are trained (adapters, a head) that all of their change is kept by default."""
        return self.trainable_share < FEW_TRAINABLE

    @property
    def stored_layers(self) -> list[LayerInfo]:
        """Layers whose values at the start the store keeps: not those of a large frozen model below an adapter."""
        left_out = self.frozen if self.trains_little else frozenset[str]()
        return [layer for layer in self.signature.layers if layer.name not in left_out]

    @property
    def stored_steps(self) -> int:
        """Steps whose delta is stored."""
        return max(1, round(self.watched * self.steps))

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps in which every sample is seen once."""
        return None if self.samples is None else max(1.0, self.samples / self.batch_size)

    @cached_property
    def itemsizes(self) -> dict[str, int]:
        """Bytes of an entry in memory, by name of the layer."""
        return {layer.name: _itemsize(layer) for layer in self.signature.layers}

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """What each rank records."""
        same: dict[int, tuple[Piece, ...]] = {}
        found = list(self._sharded() if self.sharded else self._whole_layers())
        return tuple(same.setdefault(id(pieces), tuple(pieces)) for pieces in found)

    def per_rank(self, work: Callable[[tuple[Piece, ...]], T]) -> list[T]:
        """The work's result for what each rank records; done once where several record the same."""
        done: dict[int, T] = {}
        for pieces in self.pieces:
            if id(pieces) not in done:
                done[id(pieces)] = work(pieces)
        return [done[id(pieces)] for pieces in self.pieces]

    def _piece(self, layer: LayerInfo, numel: int) -> Piece:
        itemsize = self.itemsizes[layer.name]
        if layer.kind == "buffer":
            return Piece(layer, numel, numel, "float32", itemsize)
        keep = keep_of(layer.name, self.settings.keep, self.settings.keep_overrides)
        whole = kept_count(layer.numel, keep)
        kept = whole if numel == layer.numel else min(numel, round(whole * numel / layer.numel))
        return Piece(layer, numel, kept, self.settings.value_dtype, itemsize)

    def _whole_layers(self) -> list[list[Piece]]:
        one_place = self.settings.scope == "global"
        owners = share_out([layer.numel for layer in self.parameters], 1 if one_place else self.ranks)
        trained = {layer.name for layer in self.trained}
        found: list[list[Piece]] = [[] for _ in range(self.ranks)]
        for layer, owner in zip(self.parameters, owners, strict=True):
            if layer.name in trained:
                found[owner].append(self._piece(layer, layer.numel))
        if self.settings.buffers == "record":
            found[0] += [self._piece(layer, layer.numel) for layer in self.buffers if layer.numel]
        return found

    def _sharded(self) -> Iterator[list[Piece]]:
        """Rows of every layer, cut as `torch.chunk` does: what is smaller than the number of ranks is not on all."""
        known: dict[tuple[int, ...], list[Piece]] = {}
        for rank in range(self.ranks):
            rows = [_own_rows(layer, rank, self.ranks) for layer in self.trained]
            if tuple(rows) not in known:  # nearly all ranks hold the same, and are the same object from here on
                known[tuple(rows)] = [
                    self._piece(layer, layer.numel // (layer.shape[0] if layer.shape else 1) * own)
                    for layer, own in zip(self.trained, rows, strict=True)
                    if own
                ]
            here = known[tuple(rows)]
            if rank == 0 and self.settings.buffers == "record":
                here = here + [self._piece(layer, layer.numel) for layer in self.buffers if layer.numel]
            yield here
