"""Who records what: every entry of every layer by exactly one process, which has it at hand.

Where parameters are whole on every process (one device, DDP), layers are shared out by size. Where they are sharded,
each process records the piece that it holds; of several that hold the same piece (hybrid sharding, layers that were
not sharded) one does, again shared out by size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.types import LayerPiece
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.distributed import share_out
from lightning_unlearn.utilities.sharded import held_part

__all__ = ["Held", "RecordingLayout", "layout_of", "shared_layout"]


@dataclass(frozen=True, slots=True)
class Held:
    """What one process holds of one parameter.

    Attributes:
        name: Name of the parameter in the user's module.
        numel: Number of entries of the whole parameter.
        start: Place of the first entry in the whole one.
        shape: As in `LayerPiece`.
        strides: As in `LayerPiece`.
    """

    name: str
    numel: int
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, name: str, parameter: Tensor) -> Held:
        """What this process holds of a parameter that is whole or a `DTensor`.

        Raises:
            UnsupportedStrategyError: it is cut in a way that cannot be described.
        """
        try:
            return cls(name, parameter.numel(), *held_part(parameter))
        except ValueError as error:
            raise UnsupportedStrategyError(f"`{name}` cannot be recorded. {error}") from error


@dataclass(frozen=True, slots=True)
class RecordingLayout:
    """What the processes record.

    Attributes:
        numel: Number of entries of each whole layer.
        pieces: All pieces of layers that are cut, in the order in which they are numbered.
        mine: Layer -> the piece (its place in `pieces`) that this process records of it, `None` for the whole layer.
    """

    numel: tuple[int, ...]
    pieces: tuple[LayerPiece, ...] = ()
    mine: Mapping[int, int | None] = field(default_factory=dict)

    @property
    def is_sharded(self) -> bool:
        """Whether some layer is cut."""
        return bool(self.pieces)


def layout_of(
    held: Sequence[Held], rank: int, world_size: int, *, sharded: bool = False, one_place: bool = False
) -> RecordingLayout:
    """The layout of parameters that are the same on every process, or sharded; then collective over all of them.

    Args:
        held: What this process holds of each parameter.
        rank: This process.
        world_size: Number of processes.
        sharded: Whether some parameter is sharded, on any process: one alone cannot tell, it may hold all of a layer.
        one_place: Whether whole layers all go to rank 0, for one threshold over all layers of a step.

    Raises:
        UnsupportedStrategyError: the pieces of a layer overlap, or do not add up to it; on every process.
    """
    if not sharded:
        owners = share_out([one.numel for one in held], 1 if one_place else world_size)
        mine = {number: None for number, owner in enumerate(owners) if owner == rank}
        return RecordingLayout(tuple(one.numel for one in held), (), mine)
    everyone: list[Sequence[Held]] = [held] * world_size
    dist.all_gather_object(everyone, held)
    return shared_layout(everyone, rank)


def shared_layout(everyone: Sequence[Sequence[Held]], rank: int) -> RecordingLayout:
    """The layout for one process, from what all of them hold; every process computes the same numbers.

    Raises:
        UnsupportedStrategyError: the pieces of a layer overlap, or do not add up to it.

    >>> whole, halves = Held("bias", 2, 0, (2,), (1,)), [Held("weight", 8, at, (4,), (1,)) for at in (0, 4)]
    >>> shared_layout([[half, whole] for half in halves], rank=1)
    RecordingLayout(numel=(8, 2), pieces=(LayerPiece(layer=0, start=0, shape=(4,), strides=(1,)), \
LayerPiece(layer=0, start=4, shape=(4,), strides=(1,))), mine={0: 1})
    """
    pieces: list[LayerPiece] = []
    candidates: list[tuple[int, ...]] = []
    works: list[tuple[int, int | None]] = []
    for layer, of_layer in enumerate(zip(*everyone, strict=True)):
        holders: dict[LayerPiece, list[int]] = {}
        for process, one in enumerate(of_layer):
            piece = LayerPiece(layer, one.start, one.shape, one.strides)
            if piece.numel or one.numel == 0:
                holders.setdefault(piece, []).append(process)
        distinct = sorted(holders, key=lambda piece: piece.start)
        numel = of_layer[0].numel
        if sum(piece.numel for piece in distinct) != numel:
            rule, got = f"held once or as copies, {numel} entries", f"pieces of {[one.numel for one in distinct]}"
            remedy = "Shard parameters over all processes that train, or not at all."
            raise UnsupportedStrategyError(expected(of_layer[0].name, rule, got, remedy))
        for piece in distinct:
            candidates.append(tuple(holders[piece]))
            works.append((layer, None if len(distinct) == 1 else len(pieces)))
            if len(distinct) > 1:
                pieces.append(piece)
    sizes = [everyone[0][layer].numel if place is None else pieces[place].numel for layer, place in works]
    owners = share_out(sizes, len(everyone), candidates)
    mine = {layer: place for (layer, place), owner in zip(works, owners, strict=True) if owner == rank}
    return RecordingLayout(tuple(one.numel for one in everyone[0]), tuple(pieces), mine)
