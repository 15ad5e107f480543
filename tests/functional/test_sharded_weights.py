"""Distances of models whose parameters are in pieces on two processes are those of one process."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.functional.unlearning_error import unlearning_error
from lightning_unlearn.functional.weight_distance import verification_error, weight_distance
from lightning_unlearn.metrics import UnlearningError, VerificationError
from tests.helpers.models import CLASSES, FEATURES, AwkwardNet
from tests.helpers.sharding import counted_reductions, cpu_mesh, lay_out

SHAPES = {"even": (4, 3), "uneven": (5, 2), "bias": (3,), "one row": (1, 4), "scale": (2,)}
RUN = {"lr": 0.1, "steps": 11, "singular_value": 2.5}
LAYOUTS = {
    "sharded": ((2,), (Shard(0),)),
    "replicated": ((2,), (Replicate(),)),
    "replicas of shards": ((1, 2), (Replicate(), Shard(0))),
    "shards of replicas": ((2, 1), (Shard(0), Replicate())),
}


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def numbers(unlearned, retrained, start):
    """Everything that is computed from whole models, by name."""
    options = ({}, {"per_layer": True})
    distance, error = VerificationError(relative_to=start, layers=["bias", "even"]), UnlearningError(relative=True)
    for _ in range(2):
        distance.update(unlearned, retrained)
        error.update(unlearned, start, **RUN)
    return [
        *(verification_error(unlearned, retrained, **one) for one in options),
        *(verification_error(unlearned, retrained, relative_to=start, **one) for one in options),
        *(unlearning_error(unlearned, start, **RUN, **one) for one in options),
        *(unlearning_error(unlearned, start, relative=True, **RUN, **one) for one in options),
        weight_distance(retrained, unlearned),
        distance.compute(),
        error.compute(),
    ]


def sharded_numbers(shape, placements, sides):
    """`numbers` with the named sides laid out over the mesh, the others whole; and the reductions of one distance."""
    models = {name: weights(seed) for seed, name in enumerate(("unlearned", "retrained", "start"))}
    with cpu_mesh(*shape) as mesh:
        for side in sides:
            models[side] = {name: lay_out(tensor, mesh, placements) for name, tensor in models[side].items()}
        with counted_reductions() as reductions:
            verification_error(models["unlearned"], models["retrained"])
        return numbers(*models.values()), reductions


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sides", [("unlearned", "retrained", "start"), ("unlearned",), ("retrained",), ("start",)])
def test_layouts_and_sides_give_the_number_of_one_process(gloo_pool, layout, sides):
    expected = numbers(*(weights(seed) for seed in range(3)))
    shape, placements = LAYOUTS[layout]
    in_pieces = layout != "replicated" and sides != ("start",)
    for found, reductions in gloo_pool.run(sharded_numbers, shape, placements, sides):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
        assert reductions == ([(2, len(SHAPES))] if in_pieces else [])


def other_layouts():
    """Two layouts of one mesh and of two meshes."""
    left, right = weights(0), weights(1)
    with cpu_mesh(2) as flat, cpu_mesh(2, 1) as square:

        def everywhere(tensors, mesh, placements):
            return {name: lay_out(tensor, mesh, placements) for name, tensor in tensors.items()}

        mine = everywhere(left, flat, (Shard(0),))
        theirs = everywhere(right, flat, (Replicate(),))
        squared = everywhere(right, square, (Replicate(), Shard(0)))
        return [float(verification_error(*pair)) for pair in ((mine, theirs), (theirs, mine), (mine, squared))]


def test_two_layouts_may_meet(gloo_pool):
    expected = verification_error(weights(0), weights(1)).item()
    for found in gloo_pool.run(other_layouts):
        assert found == pytest.approx([expected] * 3, rel=1e-13)


def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, FEATURES, generator=generator), torch.arange(8) % CLASSES


def trained(model, steps=3):
    x, y = batch()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def real_models():
    """A sharded training next to the same training of a whole model, compared with models of both kinds."""
    torch.manual_seed(3)
    start = AwkwardNet()
    whole, sharded = copy.deepcopy(start), copy.deepcopy(start)
    torch.manual_seed(4)
    retrained = AwkwardNet()
    with cpu_mesh(2) as mesh:
        fully_shard(sharded.inp, mesh=mesh)
        fully_shard(sharded, mesh=mesh, ignored_params={sharded.scale})  # FSDP2 takes no scalars
        other = copy.deepcopy(retrained)
        fully_shard(other, mesh=mesh, ignored_params={other.scale})
        trained(whole), trained(sharded)
        in_pieces = {name for name, one in sharded.named_parameters() if isinstance(one, DTensor)}
        found = [
            verification_error(*pair)
            for pair in (
                (sharded, other),
                (sharded, retrained),
                (retrained, sharded),
                (retrained, sharded.state_dict()),
                (sharded, retrained.state_dict()),
                (dict(sharded.named_parameters()), other),
            )
        ]
        gathered = {n: one.full_tensor() if n in in_pieces else one for n, one in sharded.named_parameters()}
        return {
            "found": found,
            "gathered": verification_error(gathered, retrained),
            "errors": [unlearning_error(one, start, buffers="include", **RUN) for one in (sharded, whole)],
            "trainings": weight_distance(sharded, whole, buffers="include"),
            "layers": list(verification_error(sharded, other, per_layer=True)),
            "in pieces": in_pieces,
        }


def test_a_model_under_fsdp2_is_measured_like_a_whole_one(gloo_pool):
    names = [name for name, _ in AwkwardNet().named_parameters()]
    for result in gloo_pool.run(real_models):
        assert result["in pieces"] == set(names) - {"scale"}
        assert result["layers"] == names
        gathered = result["gathered"].item()
        assert gathered > 1
        assert [float(one) for one in result["found"]] == pytest.approx([gathered] * 6, rel=1e-13)
        # Sharded and whole trainings differ in the order of float32 sums, and in nothing else.
        assert result["trainings"] < 1e-5
        sharded, whole = result["errors"]
        assert sharded.item() == pytest.approx(whole.item(), rel=1e-4)
        assert whole > 0


def test_flat_pieces_without_a_layout_are_refused():
    wrapped = nn.Sequential(nn.Linear(2, 2))
    wrapped[0].__class__ = type("Wrapped", (FullyShardedDataParallel, nn.Linear), {})  # needs a process group
    for pair in ((wrapped, nn.Sequential(nn.Linear(2, 2))), (nn.Sequential(nn.Linear(2, 2)), wrapped)):
        with pytest.raises(UnsupportedStrategyError, match="FSDP1"):
            verification_error(*pair)
