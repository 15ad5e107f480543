"""Whole tensors of a module in pieces equal those of the module that was never cut, on every process."""

import copy

import pytest
import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.whole_modules import filled, skeleton_of
from lightning_unlearn.utilities.whole_weights import (
    check_original_parameters,
    is_sharded,
    named_parameters,
    whole_tensors,
)
from tests.helpers.cpu_fsdp import CpuFSDPStrategy, OnCpu
from tests.helpers.sharding import cpu_mesh


class Model(nn.Module):
    """Layers that two processes cannot share evenly, one with a single row, a parameter of its own and BatchNorm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.scale = nn.Parameter(torch.randn(3))
        self.net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 1, bias=False))
        self.net[0].bias.requires_grad_(False)

    def forward(self, x):
        return self.net(x) * self.scale


def as_lists(weights):
    parts = (weights.parameters, weights.buffers, weights.counters)
    return [{name: (str(one.dtype), one.tolist()) for name, one in part.items()} for part in parts]


def shard_layers(model):
    fully_shard(model.net[0])
    fully_shard(model)


def offload(model):
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def inner_only(model):
    fully_shard(model.net)


def checkpointed(model):
    model.net[0] = checkpoint_wrapper(model.net[0])
    fully_shard(model)


def compiled(model):
    model.net[0] = torch.compile(model.net[0], backend="eager")
    fully_shard(model)


def tensor_parallel(model):
    with cpu_mesh(2) as mesh:
        parallelize_module(model.net, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})
    assert DTensor in {type(one.data) for one in model.net[3].parameters()}
    assert model.net[3].weight.placements == (Shard(1),)


def fsdp1(model):
    model.net[0] = OnCpu(model.net[0], use_orig_params=True)
    return OnCpu(model, use_orig_params=True)


def fsdp1_checkpointed(model):
    model.net[0] = OnCpu(checkpoint_wrapper(model.net[0]), use_orig_params=True)
    return OnCpu(model, use_orig_params=True)


def fsdp1_inner_only(model):
    model.net[0] = OnCpu(model.net[0], use_orig_params=True)
    model.net[3] = OnCpu(model.net[3], use_orig_params=True)


WAYS = [
    shard_layers,
    offload,
    inner_only,
    checkpointed,
    compiled,
    tensor_parallel,
    fsdp1,
    fsdp1_checkpointed,
    fsdp1_inner_only,
]


def gathered(way, everywhere):
    model = Model()
    original = copy.deepcopy(model)
    root = way(model)
    sharded = is_sharded(model, root)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.add_(dist.get_rank())  # as after a training: every process has seen other batches
    before = [one.to_local().clone() if isinstance(one, DTensor) else one.clone() for one in model.parameters()]
    weights = whole_tensors(model, everywhere=everywhere, root=root)
    after = [one.to_local() if isinstance(one, DTensor) else one for one in model.parameters()]
    untouched = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if not everywhere and dist.get_rank():
        layout = {name: (one.device.type, tuple(one.shape)) for name, one in weights.parameters.items()}
        return sharded, untouched, weights.trainable, layout
    return sharded, untouched, weights.trainable, as_lists(weights) == as_lists(whole_tensors(original))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_whole_tensors_are_those_of_the_uncut_module(gloo_pool, way):
    expected = (True, True, frozenset({"scale", "net.0.weight", "net.1.weight", "net.1.bias", "net.3.weight"}), True)
    assert gloo_pool.run(gathered, way, True) == [expected, expected]


@pytest.mark.parametrize("way", [shard_layers, fsdp1])
def test_only_rank_zero_keeps_them_where_that_is_asked(gloo_pool, way):
    zero, one = gloo_pool.run(gathered, way, False)
    assert zero[3] is True
    assert one[3] == {name: ("meta", tuple(tensor.shape)) for name, tensor in Model().named_parameters()}


def trained(way):
    """Steps of a sharded and of a plain module on the same data; a gathering before, between and after them."""
    model = Model()
    plain = copy.deepcopy(model)
    root = way(model) or model
    x = torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    found = []
    whole_tensors(model, root=root)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (model, plain)]
    for _ in range(2):
        for one, optimizer in zip((root, plain), optimizers, strict=True):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
        found.append((whole_tensors(model, root=root), whole_tensors(copy.deepcopy(plain))))
    root.eval()
    root(x)  # without a backward: FSDP2's outermost parameters stay gathered
    found.append((whole_tensors(model, root=root), whole_tensors(plain)))
    return [
        max(float((a.parameters[name] - b.parameters[name]).abs().max()) for name in b.parameters) for a, b in found
    ]


@pytest.mark.parametrize("way", [shard_layers, fsdp1])
def test_training_goes_on_behind_a_gathering(gloo_pool, way):
    for differences in gloo_pool.run(trained, way):
        assert max(differences) < 1e-6


def gathered_in_half_precision():
    model = nn.Linear(5, 3)
    expected = as_lists(whole_tensors(copy.deepcopy(model)))[0]
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    model(torch.rand(8, 5))
    assert model.weight.dtype == torch.bfloat16  # the gathered one, rounded
    return as_lists(whole_tensors(model))[0] == expected


def test_a_parameter_left_gathered_in_half_precision_comes_back_in_full(gloo_pool):
    assert gloo_pool.run(gathered_in_half_precision) == [True, True]


class Trained(LightningModule):
    """Gathers itself from a hook, before and after training."""

    def __init__(self, shards=False):
        super().__init__()
        self.model = Model()
        self.free = nn.Parameter(torch.ones(1), requires_grad=False)
        self.shards = shards
        self.kept = []

    def configure_model(self):
        if self.shards:
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return (self.model(batch[0]) * self.free).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def keep(self):
        self.kept.append((is_sharded(self), whole_tensors(self)))

    on_fit_start = on_train_end = keep


def fit(kind):
    strategy = {
        "FSDP1": lambda: CpuFSDPStrategy(auto_wrap_policy={nn.Linear}),
        "FSDP2": lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"),
        "DDP": lambda: "ddp",
    }[kind]()
    model = Trained(shards=kind == "FSDP2")
    x = torch.rand(16, 5, generator=torch.Generator().manual_seed(1))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=3, enable_model_summary=False, **quiet)
    trainer.fit(model, DataLoader(TensorDataset(x), batch_size=4))
    model.keep()
    return [(sharded, as_lists(weights)[0]) for sharded, weights in model.kept]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["FSDP1", "FSDP2"])
def test_the_root_is_found_through_the_trainer(gloo_pool, kind):
    unsharded = gloo_pool.run(fit, "DDP")[0]
    zero, one = gloo_pool.run(fit, kind)
    assert zero == one
    assert zero[0] == (True, as_lists(whole_tensors(Trained()))[0])
    assert not unsharded[0][0]
    assert zero[1] == zero[2]
    for name, (_, values) in zero[1][1].items():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(unsharded[1][1][name][1]))


def refused():
    model = Model()
    root = OnCpu(model, use_orig_params=True)
    messages = []
    for module, above in ((model, None), (OnCpu(nn.Linear(2, 2), use_orig_params=False), None)):
        with pytest.raises(UnsupportedStrategyError) as raised:
            whole_tensors(module, root=above)
        messages.append(str(raised.value))
    check_original_parameters(root)
    return messages


def test_what_cannot_be_gathered_is_refused(gloo_pool):
    for no_root, flat in gloo_pool.run(refused):
        assert "'scale'" in no_root
        assert "root=trainer.strategy.model" in no_root
        assert "use_orig_params" in flat


def test_a_plain_module_gives_its_own_tensors_without_a_process_group():
    model = Model()
    weights = whole_tensors(model, everywhere=False)
    assert all(weights.parameters[name].data_ptr() == one.data_ptr() for name, one in model.named_parameters())
    assert not any(one.requires_grad for one in weights.parameters.values())
    assert weights.buffers.keys() == {"net.1.running_mean", "net.1.running_var"}
    assert weights.counters.keys() == {"net.1.num_batches_tracked"}


class OwnName(nn.Module):
    """A module whose own names look like those of wrappers."""

    def __init__(self):
        super().__init__()
        self._orig_mod = nn.Linear(1, 1, bias=False)
        self._fsdp_wrapped_module = checkpoint_wrapper(nn.Linear(1, 1, bias=False))


def test_only_wrappers_lose_their_part_of_a_name():
    assert list(named_parameters(OwnName())) == ["_orig_mod.weight", "_fsdp_wrapped_module.weight"]
    assert list(named_parameters(torch.compile(OwnName(), backend="eager"))) == [
        "_orig_mod.weight",
        "_fsdp_wrapped_module.weight",
    ]


def test_a_skeleton_is_filled_with_what_fits_it():
    source, skeleton = Model(), skeleton_of(Model())
    copied = filled(skeleton, whole_tensors(source))
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), copied.state_dict().values(), strict=True)
    )
    other = Model()
    other.net[3] = nn.Linear(8, 1, bias=False)
    with pytest.raises(ValueError, match=r"weights\['net.3.weight'\].*\(1, 7\).*\(1, 8\)"):
        filled(skeleton, whole_tensors(other))
    other.more = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="'more'"):
        filled(skeleton, whole_tensors(other))
    with pytest.raises(ValueError, match="everywhere=True"):
        filled(skeleton, whole_tensors(Model().to("meta")))
    assert all(one.is_meta for one in skeleton.parameters())
