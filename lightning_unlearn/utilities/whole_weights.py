"""Whole weights of a module whose parameters lie in pieces on several processes (FSDP2, tensor parallel, FSDP1).

`utilities/sharded.py` computes on the pieces; this brings them together, for what needs a whole tensor: a digest, a
file, or a plain copy of the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from lightning import LightningModule
from torch import Tensor, distributed, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FlatParameter, FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected, shorten

__all__ = [
    "WholeWeights",
    "check_fits",
    "check_original_parameters",
    "is_piece",
    "is_sharded",
    "load_whole",
    "named_buffers",
    "named_parameters",
    "reshard",
    "sharding_root",
    "sharding_units",
    "under_fsdp1",
    "whole_tensors",
]

_WRAPPERS: tuple[tuple[type[nn.Module], str], ...] = (
    (FullyShardedDataParallel, "_fsdp_wrapped_module"),
    (ActivationWrapper, "_checkpoint_wrapped_module"),
    (OptimizedModule, "_orig_mod"),
)


@dataclass(frozen=True, slots=True)
class WholeWeights:
    """The tensors of a module, whole, by the names that they have in the user's own module.

    Attributes:
        parameters: Every parameter once, detached.
        buffers: Floating-point buffers, such as running statistics.
        counters: The other buffers, such as BatchNorm's number of batches.
        trainable: Names of the parameters that require a gradient.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    counters: dict[str, Tensor]
    trainable: frozenset[str]


def _users_name(module: nn.Module, name: str) -> str:
    """A tensor's name without what FSDP1, activation checkpointing and `torch.compile` put into it."""
    kept, at = [], module
    *path, last = name.split(".")
    for step in path:
        # By the kind of the module, not by the text: the user's own module may be called `_orig_mod` as well.
        if not any(isinstance(at, kind) and step == child for kind, child in _WRAPPERS):
            kept.append(step)
        at = at.get_submodule(step)
    return ".".join([*kept, last])


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters as they lie on this process, whole or in pieces, by the user's own names; tied ones count once.

    Under FSDP1 a piece is one-dimensional and may be empty.

    >>> list(named_parameters(torch.compile(nn.Linear(1, 1), backend="eager")))
    ['weight', 'bias']
    """
    return {_users_name(module, name): parameter for name, parameter in module.named_parameters()}


def named_buffers(module: nn.Module) -> dict[str, Tensor]:
    """All buffers by the user's own names."""
    return {_users_name(module, name): buffer for name, buffer in module.named_buffers()}


def sharding_root(module: nn.Module) -> nn.Module:
    """The outermost module that is sharded together with `module`.

    Lightning's `FSDPStrategy` wraps the LightningModule itself, so the root lies above it; it is found through the
    module's Trainer. Everything else is its own root.
    """
    if isinstance(module, LightningModule) and module._trainer is not None:
        above = module._trainer.strategy.model
        # By its dict of parameters, which a wrapped module shares with the object that the strategy knows.
        if isinstance(above, nn.Module) and any(one._parameters is module._parameters for one in above.modules()):
            return above
    return module


def is_piece(tensor: Tensor) -> bool:
    """Whether a tensor is this process's part of one: a `DTensor`, or a parameter under FSDP1.

    >>> is_piece(torch.ones(1))
    False
    """
    return isinstance(tensor, DTensor) or bool(getattr(tensor, "_fsdp_flattened", False))


def under_fsdp1(module: nn.Module, root: nn.Module | None = None) -> bool:
    """Whether FSDP1 shards a module or parts of it, where `is_sharded` says yes for FSDP2 and `DTensor`s as well."""
    above = sharding_root(module) if root is None else root
    return any(isinstance(one, FullyShardedDataParallel) for one in (above, *module.modules())) or any(
        is_piece(one) and not isinstance(one, DTensor) for one in module.parameters()
    )


def reshard(module: nn.Module, root: nn.Module | None = None) -> None:
    """Have FSDP2 let go of parameters that it has gathered for a forward, so that they are `DTensor`s again.

    After a forward without a backward the outermost FSDP2 module shows gathered parameters, in the precision of the
    forward; what is written to those is lost. Where nothing is gathered, and without FSDP2, nothing happens.

    >>> reshard(nn.Linear(1, 1))
    """
    for one in {*(sharding_root(module) if root is None else root).modules(), *module.modules()}:
        if isinstance(one, FSDPModule):
            one.reshard()


def is_sharded(module: nn.Module, root: nn.Module | None = None) -> bool:
    """Whether parameters or buffers of a module are distributed: `DTensor`s, or under FSDP1 (also with one process).

    DDP keeps every parameter whole on every process, so it is not.

    Args:
        module: The module.
        root: The outermost FSDP module, where `module` is below it; by default `sharding_root(module)`.

    >>> is_sharded(nn.Linear(1, 1))
    False
    """
    tensors = [*module.parameters(), *module.buffers()]
    above = sharding_root(module) if root is None else root
    return (
        any(map(is_piece, tensors))
        or any(isinstance(one, FSDPModule | FullyShardedDataParallel) for one in module.modules())
        or isinstance(above, FSDPModule | FullyShardedDataParallel)
    )


def check_original_parameters(module: nn.Module, root: nn.Module | None = None) -> None:
    """Refuse FSDP1 without `use_orig_params`, under which parameters have neither the user's names nor shapes.

    Raises:
        UnsupportedStrategyError: it is in force.

    >>> check_original_parameters(nn.Linear(1, 1))
    """
    for one in (module, sharding_root(module) if root is None else root):
        if any(isinstance(parameter, FlatParameter) for parameter in one.parameters()):
            rule = "FSDP with `use_orig_params=True`, so that parameters keep their names and shapes"
            remedy = "Leave `use_orig_params` to Lightning, which sets it, or use `ModelParallelStrategy`."
            raise UnsupportedStrategyError(expected("strategy", rule, "use_orig_params=False", remedy))


@torch.no_grad()
def whole_tensors(module: nn.Module, *, everywhere: bool = True, root: nn.Module | None = None) -> WholeWeights:
    """The whole tensors of a module.

    A module that is not sharded gives its own tensors, without a copy and without communication. Otherwise every
    process must call this, outside forward and backward. Sharded tensors are gathered one layer (under FSDP1: one FSDP
    module) at a time and copied to the CPU. What lies whole on every process (buffers, parameters that nobody shards)
    is rank 0's, as in a checkpoint: running statistics differ between processes.

    Args:
        module: Plain, with `DTensor` parameters, or in FSDP1; the user's, or the wrapper of a pass.
        everywhere: Whether all processes get the tensors. With `False` only rank 0 does, and the others get tensors on
            the `meta` device, which tell names, shapes and dtypes.
        root: The outermost FSDP module, where `module` is below it; by default `sharding_root(module)`, which finds
            Lightning's. FSDP1 sets itself up from there when it is first asked for whole parameters.

    Returns:
        The tensors, detached.

    Raises:
        UnsupportedStrategyError: FSDP1 without `use_orig_params`, or its outermost module lies above `root`.

    >>> linear = nn.Linear(2, 1)
    >>> whole_tensors(linear).parameters["weight"].data_ptr() == linear.weight.data_ptr()
    True
    """
    above = sharding_root(module) if root is None else root
    check_original_parameters(module, above)
    sharded = is_sharded(module, above)
    reshard(module, above)
    parameters, buffers = named_parameters(module), named_buffers(module)
    trainable = frozenset(name for name, parameter in parameters.items() if parameter.requires_grad)
    found: dict[str, Tensor] = {name: one.detach() for name, one in parameters.items()} | buffers
    if sharded:
        found = _gathered(module, above, found, everywhere)
    floating = {name: found[name] for name, buffer in buffers.items() if buffer.is_floating_point()}
    counters = {name: found[name] for name in buffers if name not in floating}
    return WholeWeights({name: found[name] for name in parameters}, floating, counters, trainable)


def _gathered(module: nn.Module, root: nn.Module, tensors: Mapping[str, Tensor], everywhere: bool) -> dict[str, Tensor]:
    keep = everywhere or distributed.get_rank() == 0
    found = dict(_gathered_units(module, root, keep))
    for name, one in tensors.items():
        if name not in found and isinstance(one, DTensor):
            found[name] = _copied(_whole(one), keep)
    others = {name: _copied(one, keep) for name, one in tensors.items() if name not in found}
    if everywhere and others:
        shared = [list(others.values())]
        distributed.broadcast_object_list(shared, src=0)
        others = dict(zip(others, shared[0], strict=True))
    return found | others


def _whole(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    kind = tensor.device_mesh.device_type
    # What is offloaded to the host is gathered where the mesh is.
    there: DTensor = tensor if tensor.device.type == kind else tensor.to(kind)  # type: ignore[assignment]
    return there.full_tensor()


def _copied(tensor: Tensor, keep: bool) -> Tensor:
    # A copy even on the host: a gathered layer is freed, and a tensor that is whole everywhere belongs to the module.
    return tensor.detach().to("cpu" if keep else "meta", copy=True)


def _units(root: nn.Module, unit: FullyShardedDataParallel | None = None) -> Iterator[tuple[int, nn.Module | None]]:
    """For every module below `root`, known by its dict of parameters, the FSDP1 module that shards them."""
    unit = root if isinstance(root, FullyShardedDataParallel) else unit
    yield id(root._parameters), unit
    for child in root.children():
        yield from _units(child, unit)


def sharding_units(module: nn.Module, root: nn.Module | None = None) -> dict[FullyShardedDataParallel, list[str]]:
    """The FSDP1 modules that shard parameters of a module, and the users' names of these; none elsewhere.

    The order is that of the module's parameters, so it is the same on every process.

    >>> sharding_units(nn.Linear(1, 1))
    {}
    """
    unit_of = dict(_units(sharding_root(module) if root is None else root))
    found: dict[FullyShardedDataParallel, list[str]] = {}
    for name, _ in module.named_parameters():
        unit = unit_of.get(id(module.get_submodule(name.rpartition(".")[0])._parameters))
        if isinstance(unit, FullyShardedDataParallel):
            found.setdefault(unit, []).append(_users_name(module, name))
    return found


def _gathered_units(module: nn.Module, root: nn.Module, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """The parameters that FSDP1 modules shard, one such module after the other, the outermost first."""
    unit_of = dict(_units(root))
    members: dict[int, list[tuple[str, nn.Module, str]]] = {}
    lost = []
    for name, parameter in module.named_parameters():
        path, _, last = name.rpartition(".")
        parent = module.get_submodule(path)
        unit = unit_of.get(id(parent._parameters))
        if unit is not None:
            members.setdefault(id(unit), []).append((_users_name(module, name), parent, last))
        elif is_piece(parameter) and not isinstance(parameter, DTensor):
            lost.append(_users_name(module, name))
    if lost:
        rule, remedy = "the outermost FSDP module", "Pass `root=trainer.strategy.model`."
        raise UnsupportedStrategyError(expected("root", rule, f"one without {shorten(lost)}", remedy))
    for unit in root.modules():
        # The root even where the module has nothing in it: it tells the others how they belong together.
        if isinstance(unit, FullyShardedDataParallel) and (unit is root or id(unit) in members):
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
                for name, parent, last in members.get(id(unit), ()):
                    yield name, _copied(_whole(getattr(parent, last)), keep)


@torch.no_grad()
def load_whole(module: nn.Module, weights: WholeWeights) -> None:
    """Copy whole tensors into a plain module, in place; devices and dtypes stay the module's.

    Args:
        module: Not sharded, with the same names and shapes.
        weights: What `whole_tensors` gave on this process.

    Raises:
        UnsupportedStrategyError: the module is sharded.
        ValueError: names or shapes differ, or the tensors are another process' (on the `meta` device); nothing was
            changed.

    >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> load_whole(b, whole_tensors(a))
    >>> torch.equal(a.weight, b.weight)
    True
    """
    if is_sharded(module):
        raise UnsupportedStrategyError(expected("module", "a module that is not sharded", type(module).__name__))
    targets: dict[str, Tensor] = {**named_parameters(module), **named_buffers(module)}
    given = check_fits(weights, targets)
    for name, target in targets.items():
        target.copy_(given[name])


def check_fits(weights: WholeWeights, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check that whole tensors have the names and shapes of a module's parameters and buffers.

    Returns:
        All tensors of `weights` by name.

    Raises:
        ValueError: they have not, or they are another process' (on the `meta` device).
    """
    given: dict[str, Tensor] = weights.parameters | weights.buffers | weights.counters
    if differing := sorted(given.keys() ^ targets.keys()):
        raise ValueError(expected("weights", "with the names of the module's tensors", shorten(differing)))
    for name, target in targets.items():
        if given[name].shape != target.shape:
            rule = f"of shape {tuple(target.shape)}"
            raise ValueError(expected(f"weights[{name!r}]", rule, tuple(given[name].shape)))
        if given[name].is_meta:
            remedy = "Gather them with `everywhere=True`."
            raise ValueError(expected(f"weights[{name!r}]", "on this process", "a tensor of another one", remedy))
    return given
