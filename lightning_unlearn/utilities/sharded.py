"""Parameters in pieces on several processes (`DTensor`, as under FSDP2 and Lightning's `ModelParallelStrategy`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from lightning_unlearn.utilities.checks import expected

__all__ = ["global_sums", "held_part", "is_cut", "local_part", "local_part_like"]


def _settled(tensor: DTensor) -> DTensor:
    """The tensor, where what the processes hold are its entries and not terms that are still to be added up."""
    if any(placement.is_partial() for placement in tensor.placements):
        rule, remedy = "replicated or sharded over each mesh dimension", "Call its redistribute() first."
        raise ValueError(expected("tensor", rule, tensor.placements, remedy))
    return tensor


def _cut_dimensions(tensor: DTensor) -> tuple[int, ...]:
    """Mesh dimensions along which the processes hold different entries."""
    # Not `is_shard()`, which says no to the strided shards of tensor parallelism under FSDP.
    return tuple(
        dimension
        for dimension, placement in enumerate(_settled(tensor).placements)
        if not placement.is_replicate() and tensor.device_mesh.size(dimension) > 1
    )


def is_cut(tensor: Tensor) -> bool:
    """Whether processes hold different entries of a tensor; every process gives the same answer.

    >>> is_cut(torch.ones(2))
    False
    """
    return isinstance(tensor, DTensor) and bool(_cut_dimensions(tensor))


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard, or all of it where the tensor is not sharded.

    Differentiable: the gradient of a sharded parameter comes back as a shard. No communication and no copy.

    Raises:
        ValueError: the processes hold terms of a pending sum (a `Partial` placement), not entries.

    >>> local_part(torch.ones(2))
    tensor([1., 1.])
    """
    return _settled(tensor).to_local() if isinstance(tensor, DTensor) else tensor


def local_part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process would hold of `tensor`, were it laid out as `like`; a whole tensor where `like` is whole.

    A tensor of the same layout is taken as it is, a whole one is cut without communication (it must be the same on all
    processes). Everything else is gathered first: every process then calls this, and holds the whole tensor meanwhile.

    Args:
        tensor: Of any layout.
        like: Of the same shape.

    Raises:
        ValueError: one of them has a `Partial` placement.

    >>> local_part_like(torch.ones(2), torch.zeros(2))
    tensor([1., 1.])
    """
    if isinstance(tensor, DTensor):
        if isinstance(like, DTensor) and (tensor.device_mesh, tensor.placements) == (like.device_mesh, like.placements):
            return local_part(tensor)
        tensor = _settled(tensor).full_tensor()
    if not isinstance(like, DTensor):
        return tensor
    mesh = _settled(like).device_mesh
    # Unlike `distribute_tensor`, which would send the first process' tensor to all others.
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements).to_local()


@torch.no_grad()
def global_sums(local: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Turn what each process summed over its part of some tensors into the sums over the whole tensors.

    A mesh dimension over which a tensor is sharded is summed over, one over which it is replicated counts once. Tensors
    that are sharded over the same mesh dimensions share one reduction; where nothing is sharded there is none. Every
    process must call this with the same tensors in the same order, also one whose parts are empty.

    Args:
        local: Scalars, one for each tensor: a sum over its `local_part`.
        like: The tensors that the sums are of.

    Returns:
        Scalars without a graph, with the dtype and device of `local`, the same on every process.

    Raises:
        ValueError: a tensor has a `Partial` placement, or the lengths differ.

    >>> global_sums([torch.tensor(4.0)], [torch.full((4,), 1.0)])
    [tensor(4.)]
    """
    sums = [one.detach() for one in local]
    together: dict[tuple[DeviceMesh, tuple[int, ...], torch.dtype], list[int]] = {}
    for position, (one, tensor) in enumerate(zip(sums, like, strict=True)):
        if isinstance(tensor, DTensor) and (dimensions := _cut_dimensions(tensor)):
            together.setdefault((tensor.device_mesh, dimensions, one.dtype), []).append(position)
    for (mesh, dimensions, _), positions in together.items():
        # Parameters that are offloaded to the host are reduced where their mesh is.
        mine = [sums[position] for position in positions]
        mine = [one if one.device.type == mesh.device_type else one.to(mesh.device_type) for one in mine]
        stacked = torch.stack(mine)
        for dimension in dimensions:
            distributed.all_reduce(stacked, group=mesh.get_group(dimension))
        for position, value in zip(positions, stacked.unbind(), strict=True):
            sums[position] = value.to(local[position].device)
    return sums


def held_part(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Where the entries that this process holds of a tensor are in it: start, shape and strides, in row-major order.

    Neighbouring entries are joined into one dimension, so a tensor that is whole, or cut along its first dimension, has
    the shape `(n,)`. No communication; for a sharded tensor eight bytes for each of its entries, for a moment.

    Raises:
        ValueError: a `Partial` placement, or entries that are not evenly spaced.

    >>> held_part(torch.ones(2, 3))
    (0, (6,), (1,))
    """
    if not is_cut(tensor) or not isinstance(tensor, DTensor):
        return 0, (tensor.numel(),), (1,)
    device = tensor.device_mesh.device_type
    places = local_part_like(torch.arange(tensor.numel(), device=device).view(tensor.shape), tensor).cpu()
    if not places.numel():
        return 0, (0,), (1,)
    start = int(places.flatten()[0])
    sizes = [size for size in places.shape if size > 1]
    corner = places.squeeze()
    steps = [int(corner.select(dimension, 1).flatten()[0]) - start for dimension in range(corner.ndim)]
    shape, strides = [1], [1]
    for size, step in zip(reversed(sizes), reversed(steps), strict=True):
        if step == shape[0] * strides[0]:
            shape[0] *= size
        elif shape == [1]:
            shape, strides = [size], [step]
        else:
            shape, strides = [size, *shape], [step, *strides]
    evenly = torch.arange(1).new_full(shape, start)
    for dimension, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        evenly += (torch.arange(size) * stride).view([-1 if one == dimension else 1 for one in range(len(shape))])
    if not torch.equal(evenly.flatten(), places.flatten()):
        rule, remedy = "cut into evenly spaced entries", "Lay it out with `Shard` placements."
        raise ValueError(expected("tensor", rule, tensor.placements, remedy))
    return start, tuple(shape), tuple(strides)
