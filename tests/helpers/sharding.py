"""Device meshes inside the gloo pool, and tensors laid out over them."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate


@contextmanager
def cpu_mesh(*shape):
    """A mesh over the pool's processes; groups that were made for it are gone afterwards, the pool's own is not."""
    mesh = init_device_mesh("cpu", shape)
    try:
        yield mesh
    finally:
        for group in mesh.get_all_groups():
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def lay_out(tensor, mesh, placements):
    """A whole tensor, the same on both processes, as a `DTensor`."""
    with torch.no_grad():
        whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return whole.redistribute(placements=placements)


@contextmanager
def counted_reductions():
    """The groups that `all_reduce` was called with, by size."""
    sizes, original = [], dist.all_reduce

    def counting(tensor, *args, group=None, **kwargs):
        sizes.append((dist.get_world_size(group), tensor.numel()))
        return original(tensor, *args, group=group, **kwargs)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = original
