"""Who records what: every entry of every layer by exactly one process, which has it at hand.

Where parameters are whole on every process (one device, DDP), layers are shared out by size. Where they are sharded,
each process records the piece that it holds; of several that hold the same piece (hybrid sharding, layers that were
not sharded) one does, again shared out by size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import ShardingStrategy

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.types import LayerPiece
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.distributed import share_out
from lightning_unlearn.utilities.sharded import held_part
from lightning_unlearn.utilities.whole_weights import WholeWeights, sharding_units

__all__ = ["Held", "RecordingLayout", "has_own_samples", "held_parts", "layout_of", "shared_layout"]


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


def has_own_samples(strategy: Strategy) -> bool:
    """Whether the samples of this process are to be recorded: under tensor parallelism several see the same ones."""
    if isinstance(strategy, ModelParallelStrategy):
        return strategy.device_mesh["tensor_parallel"].get_local_rank() == 0
    return True


def held_parts(module: nn.Module, weights: WholeWeights) -> list[Held]:
    """What this process holds of each parameter of a module; collective under FSDP1.

    FSDP1 cuts the parameters of a module, one after the other, into one run for each process, in the order of the
    processes: so the runs of the processes before this one tell where its own begins.

    Args:
        module: The module.
        weights: Names and shapes of its whole parameters, in the same order.

    Raises:
        UnsupportedStrategyError: a parameter is cut in a way that cannot be described.
    """
    parameters = dict(zip(weights.parameters, module.parameters(), strict=True))
    starts: dict[str, int] = {}
    for unit, names in sharding_units(module).items():
        if unit.sharding_strategy is not ShardingStrategy.NO_SHARD:
            starts |= _runs_before({name: parameters[name].numel() for name in names}, unit.process_group)
    held = []
    for name, parameter in parameters.items():
        if name in starts:
            run = (parameter.numel(),)
            held.append(Held(name, weights.parameters[name].numel(), starts[name] if run[0] else 0, run, (1,)))
        else:
            held.append(Held.of(name, parameter))
    return held


def _runs_before(numel: Mapping[str, int], group: dist.ProcessGroup | None) -> dict[str, int]:
    """How many entries of each parameter the processes of a group hold that come before this one."""
    everyone: list[Mapping[str, int]] = [numel] * dist.get_world_size(group)
    dist.all_gather_object(everyone, numel, group=group)
    before = everyone[: dist.get_rank(group)]
    return {name: sum(other[name] for other in before) for name in numel}


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
