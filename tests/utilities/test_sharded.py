"""Sums over tensors in pieces equal the sums over the whole tensors, with as few reductions as can be."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_unlearn.utilities.sharded import global_sums, held_part, is_cut, local_part, local_part_like
from tests.helpers.distributed import GlooPool
from tests.helpers.sharding import counted_reductions, cpu_mesh, lay_out

SHAPES = {"even": (4, 3), "uneven": (3, 2), "one row": (1, 5), "vector": (3,), "no row": (0, 2)}
LAYOUTS = {
    "sharded": ((2,), (Shard(0),)),
    "replicated": ((2,), (Replicate(),)),
    "replicas of shards": ((2, 1), (Replicate(), Shard(0))),
    "shards of replicas": ((2, 1), (Shard(0), Replicate())),
    "sharded twice": ((1, 2), (Shard(0), Shard(0))),
    "strided": ((2, 1), (_StridedShard(0, split_factor=1), Shard(0))),
}


def wholes():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES.values()]


def squares(tensors):
    return [local_part(one).square().sum() for one in tensors]


def sums_of(shape, placements):
    with cpu_mesh(*shape) as mesh:
        laid_out = [lay_out(one, mesh, placements) for one in wholes()]
        with counted_reductions() as reductions:
            found = global_sums(squares(laid_out), laid_out)
        return found, reductions


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_those_of_the_whole_tensors(gloo_pool, layout):
    shape, placements = LAYOUTS[layout]
    for found, reductions in gloo_pool.run(sums_of, shape, placements):
        torch.testing.assert_close(found, squares(wholes()), rtol=1e-14, atol=0)
        in_pieces = any(size > 1 and not one.is_replicate() for size, one in zip(shape, placements, strict=True))
        assert reductions == ([(2, len(SHAPES))] if in_pieces else [])


def mixed_sums():
    """Two meshes, two dtypes, a replicated and a plain tensor, in no particular order."""
    a, b, *_, plain, _ = wholes()
    with cpu_mesh(2) as flat, cpu_mesh(2, 1) as square:
        tensors = [
            lay_out(a, flat, (Shard(0),)),
            plain,
            lay_out(b, square, (Shard(0), Replicate())),
            lay_out(b, flat, (Shard(1),)),
            lay_out(a.float(), flat, (Shard(0),)),
            lay_out(a, flat, (Replicate(),)),
        ]
        with counted_reductions() as reductions:
            return global_sums(squares(tensors), tensors), reductions


def test_layouts_may_be_mixed_and_share_reductions(gloo_pool):
    a, b, *_, plain, _ = wholes()
    for found, reductions in gloo_pool.run(mixed_sums):
        torch.testing.assert_close(found, squares([a, plain, b, b, a.float(), a]), rtol=1e-6, atol=0)
        assert reductions == [(2, 2), (2, 1), (2, 1)]


SQUARE = {
    "rows twice": (Shard(0), Shard(0)),
    "rows and columns": (Shard(0), Shard(1)),
    "tensor parallel under FSDP": (_StridedShard(0, split_factor=2), Shard(0)),
    "replicas of shards": (Replicate(), Shard(0)),
}


def square_sums(placements):
    with cpu_mesh(2, 2) as mesh:
        tensors = [one for one in wholes() if one.ndim == 2]
        laid_out = [lay_out(one, mesh, placements) for one in tensors]
        agree = [torch.equal(local_part_like(a, b), b.to_local()) for a, b in zip(tensors, laid_out, strict=True)]
        with counted_reductions() as reductions:
            return global_sums(squares(laid_out), laid_out), reductions, agree


@pytest.mark.slow
def test_both_dimensions_of_a_mesh_of_four_processes_are_summed_over():
    pool = GlooPool(world_size=4)
    try:
        for placements in SQUARE.values():
            expected = squares([one for one in wholes() if one.ndim == 2])
            for found, reductions, agree in pool.run(square_sums, placements):
                torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
                assert len(reductions) == sum(not one.is_replicate() for one in placements)
                assert all(agree)
    finally:
        pool.close()


def gradients():
    """Gradient of a sum of squares through the local part, and whether the sums carry a graph."""
    whole = torch.arange(3.0)
    with cpu_mesh(2) as mesh:
        parameter = nn.Parameter(lay_out(whole, mesh, (Shard(0),)))
        local = [local_part(parameter).square().sum()]
        sums = global_sums(local, [parameter])
        local[0].backward()
        return parameter.grad.full_tensor(), parameter.grad.placements, sums[0].requires_grad, float(sums[0])


def test_the_local_part_is_differentiable_and_the_sums_have_no_graph(gloo_pool):
    for gradient, placements, graph, total in gloo_pool.run(gradients):
        assert torch.equal(gradient, 2 * torch.arange(3.0))
        assert placements == (Shard(0),)
        assert not graph
        assert total == 5.0


def cut(shape, placements, other):
    """Every tensor brought to a layout, from the whole one and from a tensor of another layout."""
    with cpu_mesh(*shape) as mesh:
        agree = []
        for one in wholes():
            like = lay_out(one, mesh, placements)
            mine = like.to_local()
            agree.append(torch.equal(local_part_like(one, like), mine))
            agree.append(torch.equal(local_part_like(like, like), mine))
            agree.append(torch.equal(local_part_like(like, one), one))
            agree.append(torch.equal(local_part_like(lay_out(one, mesh, other), like), mine))
        return agree


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_brought_to_any_other(gloo_pool, layout):
    shape, placements = LAYOUTS[layout]
    for other in (placements, (Replicate(),) * len(shape), (*(Replicate() for _ in shape[1:]), Shard(0))):
        assert all(all(agree) for agree in gloo_pool.run(cut, shape, placements, other))


def pending():
    with cpu_mesh(2) as mesh:
        tensor = dist.tensor.DTensor.from_local(torch.ones(2), mesh, (Partial(),))
        whole = torch.ones(2)
        messages = []
        for call in (
            lambda: local_part(tensor),
            lambda: global_sums([torch.ones(())], [tensor]),
            lambda: local_part_like(tensor, whole),
            lambda: local_part_like(whole, tensor),
        ):
            with pytest.raises(ValueError, match="replicated or sharded") as raised:
                call()
            messages.append(str(raised.value))
        return messages


def test_a_pending_sum_is_refused(gloo_pool):
    for messages in gloo_pool.run(pending):
        assert all("Partial" in message and "redistribute()" in message for message in messages)


def test_plain_tensors_need_no_process_group():
    values = [torch.tensor(2.0, requires_grad=True), torch.tensor(3.0)]
    found = global_sums(values, [torch.ones(2), torch.ones(1)])
    assert [float(one) for one in found] == [2.0, 3.0]
    assert not any(one.requires_grad for one in found)
    with pytest.raises(ValueError, match="argument 2"):
        global_sums(values, [torch.ones(2)])


def groups_left():
    return len(dist.distributed_c10d._world.pg_map)


def test_a_mesh_leaves_no_group_in_the_pool(gloo_pool):
    before = gloo_pool.run(groups_left)
    gloo_pool.run(mixed_sums)
    assert gloo_pool.run(groups_left) == before


def held_places():
    """For tensors that are cut along one dimension: whether the description gives the entries that are held."""
    found = []
    with cpu_mesh(2) as mesh:
        for shape, dimension in [
            ((7, 5), 0),
            ((4, 6), 1),
            ((3, 4, 5), 1),
            ((3, 4, 5), 2),
            ((1,), 0),
            ((5,), 0),
            ((1, 1, 6), 2),
        ]:
            whole = torch.arange(float(torch.Size(shape).numel()))
            tensor = lay_out(whole.view(shape), mesh, [Shard(dimension)])
            start, sizes, strides = held_part(tensor)
            found.append(torch.equal(whole.as_strided(sizes, strides, start).flatten(), local_part(tensor).flatten()))
        replicated = lay_out(torch.ones(4, 6), mesh, [Replicate()])
        found.append(held_part(replicated) == (0, (24,), (1,)) and not is_cut(replicated))
        found.append(is_cut(lay_out(torch.ones(1), mesh, [Shard(0)])))
    return found


def test_what_is_held_of_a_tensor_is_told_by_start_shape_and_strides(gloo_pool):
    assert gloo_pool.run(held_places) == [[True] * 9] * 2


def test_terms_of_a_sum_are_no_entries(gloo_pool):
    assert gloo_pool.run(partial_is_refused) == [True, True]


def partial_is_refused():
    with cpu_mesh(2) as mesh:
        tensor = DTensor.from_local(torch.ones(2), mesh, [Partial()])
        with pytest.raises(ValueError, match="replicated or sharded"):
            held_part(tensor)
    return True
