"""Whole weights of a module whose parameters lie in pieces on several processes (FSDP2, tensor parallel, FSDP1).

`utilities/sharded.py` computes on the pieces; this brings them together, for what needs a whole tensor: a digest, a
file, or a plain copy of the module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
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
from lightning_unlearn.utilities.distributed import on_first_process
from lightning_unlearn.utilities.sharded import local_part

__all__ = [
    "WholeWeights",
    "check_original_parameters",
    "fsdp1_parameters",
    "is_piece",
    "is_sharded",
    "named_buffers",
    "named_parameters",
    "reshard",
    "sharding_root",
    "sharding_units",
    "share_buffers",
    "under_fsdp1",
    "whole_tensors",
    "writable_parameters",
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


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the first one, in place; without other processes there is nothing to do.

    >>> share_buffers(nn.BatchNorm1d(1))
    """
    buffers = dict(module.named_buffers())
    # Where processes were spawned they have ended, and this one has the first one's already.
    values = on_first_process(lambda: [buffer.detach().cpu() for buffer in buffers.values()])
    for buffer, value in zip(buffers.values(), values, strict=True):
        buffer.copy_(value)


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
    is rank 0's, as in a checkpoint of one file: running statistics differ between processes.

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
    found = {name: _copied(_whole(one), keep) for name, one in fsdp1_parameters(module, root)}
    for name, one in tensors.items():
        if name not in found and isinstance(one, DTensor):
            found[name] = _copied(_whole(one), keep)
    others = {name: _copied(one, keep) for name, one in tensors.items() if name not in found}
    return found | (on_first_process(lambda: others) if everywhere and others else others)


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


def fsdp1_parameters(
    module: nn.Module, root: nn.Module, names: Collection[str] | None = None, *, write: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The parameters that FSDP1 modules shard, whole, one such module after the other, the outermost first.

    Each is valid until the next one is asked for. Every process asks for all of them.

    Args:
        module: The module.
        root: The outermost FSDP module.
        names: The users' names of those that are wanted; all by default.
        write: Whether what is written to them is kept.

    Raises:
        UnsupportedStrategyError: the outermost module lies above `root`.
    """
    unit_of = dict(_units(root))
    members: dict[int, list[tuple[str, nn.Module, str]]] = {}
    lost = []
    for name, parameter in module.named_parameters():
        path, _, last = name.rpartition(".")
        parent, users = module.get_submodule(path), _users_name(module, name)
        unit = unit_of.get(id(parent._parameters))
        if unit is not None and (names is None or users in names):
            members.setdefault(id(unit), []).append((users, parent, last))
        elif unit is None and is_piece(parameter) and not isinstance(parameter, DTensor):
            lost.append(users)
    if lost:
        rule, remedy = "the outermost FSDP module", "Pass `root=trainer.strategy.model`."
        raise UnsupportedStrategyError(expected("root", rule, f"one without {shorten(lost)}", remedy))
    for unit in root.modules():
        # The root even where the module has nothing in it: it tells the others how they belong together.
        if isinstance(unit, FullyShardedDataParallel) and (unit is root or id(unit) in members):
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=write):
                for users, parent, last in members.get(id(unit), ()):
                    yield users, getattr(parent, last)


def writable_parameters(
    module: nn.Module, names: Collection[str], root: nn.Module | None = None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What this process holds of some parameters, to be written to, one after the other; every process asks for all.

    Args:
        module: The module.
        names: The users' names of the parameters.
        root: As in `whole_tensors`.

    Yields:
        Name, tensor to write to before the next one is asked for, and a tensor that is laid out as the parameter; see
        `local_part_like`. Under FSDP1 it is the whole parameter, of which each process keeps what is its own.
    """
    above = sharding_root(module) if root is None else root
    reshard(module, above)
    done = set()
    for name, whole in fsdp1_parameters(module, above, names, write=True):
        done.add(name)
        yield name, whole.detach(), whole.detach()
    for name, one in named_parameters(module).items():
        if name in names and name not in done:
            yield name, local_part(one.detach()), one.detach()
