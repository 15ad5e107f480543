"""A pass whose Trainer shards the model: the change is that of one process, and the model comes back whole."""

import inspect
import warnings

import pytest
import torch
from lightning import LightningModule, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_unlearn.api import unlearn
from lightning_unlearn.exceptions import UnlearningWarning, UnsupportedStrategyError
from lightning_unlearn.methods import METHODS, FineTune, GradientAscent, LossMethod, Retrain
from lightning_unlearn.procedures.guards import ProbeThresholds
from lightning_unlearn.utilities.whole_weights import is_sharded
from tests.helpers.cpu_fsdp import CpuFSDPStrategy
from tests.methods.test_two_processes import CLASSES, FORGET, ROWS, Smooth, dataset, forget, names, watched

KINDS = ("FSDP1", "FSDP2")
# Masks compare the entries of whole layers; the penalty of L1Sparse is one of all weights at once.
REFUSED = {
    "FSDP1": {"L1Sparse", "PartialGradientAscent", "PartialLabelFlipping", "SalUn"},
    "FSDP2": {"PartialGradientAscent", "PartialLabelFlipping", "SalUn"},
}
QUICK = {("NegGradPlus", "FSDP1"), ("Scrub", "FSDP1"), ("NegGradPlus", "FSDP2"), ("L1Sparse", "FSDP2")}


class Sharding(Smooth):
    """Shards itself where a strategy has a mesh for it, and is an ordinary module elsewhere."""

    def configure_model(self):
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)


def strategy_of(kind):
    if kind == "FSDP1":
        return CpuFSDPStrategy(auto_wrap_policy={nn.Linear})
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def forget_sharded(name, kind):
    return forget(name, ROWS // 2, 2, strategy_of(kind), Sharding)


def cases():
    for name in (parameter.values[0] for parameter in names()):
        for kind in KINDS:
            if name not in REFUSED[kind]:
                yield pytest.param(name, kind, marks=[] if (name, kind) in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("name", "kind"), list(cases()))
def test_the_change_is_that_of_one_process(gloo_pool, name, kind):
    alone = torch.tensor(forget(name, ROWS, 1))
    shared = [torch.tensor(one) for one in gloo_pool.run(forget_sharded, name, kind)]
    assert torch.equal(shared[0], shared[1])
    assert float(alone.norm()) > 0
    assert float((shared[0] - alone).norm()) <= 1e-5 * float(alone.norm())


def refusal(name, kind):
    with pytest.raises(UnsupportedStrategyError) as raised:
        forget_sharded(name, kind)
    return str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_methods_that_compare_the_entries_of_a_layer_are_refused_by_name(gloo_pool, kind):
    for name in sorted(REFUSED[kind]):
        for message in gloo_pool.run(refusal, name, kind):
            assert ("FSDP2" if name == "L1Sparse" else "DDP or one device") in message


def watched_sharded(kind):
    return watched(ROWS // 2, 2, strategy_of(kind), Sharding)


def test_a_pass_is_stopped_where_one_process_stops_it(gloo_pool):
    alone, steps, notes = watched(ROWS, 1)
    (first, *others), (second, *same) = gloo_pool.run(watched_sharded, "FSDP2")
    assert any("taken back" in note for note in notes)
    assert first == second
    assert others == same == [steps, notes]
    assert torch.allclose(torch.tensor(first), torch.tensor(alone), rtol=1e-4, atol=1e-6)


def watched_under_fsdp1():
    with pytest.raises(UnsupportedStrategyError) as raised:
        watched_sharded("FSDP1")
    return str(raised.value)


def test_to_look_at_held_out_data_beside_the_steps_is_refused_under_fsdp1(gloo_pool):
    for message in gloo_pool.run(watched_under_fsdp1):
        assert "stop=None" in message
        assert "ModelParallelStrategy" in message


def scrub_r(kind, processes):
    """Weights after a pass that goes back to those of an earlier epoch."""
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    data = {"train": DataLoader(dataset(), ROWS // processes), "val": DataLoader(dataset(seed=1), 7)}
    method = METHODS["ScrubR"](**({"stop": None} if "stop" in inspect.signature(METHODS["ScrubR"]).parameters else {}))
    trainer = {"accelerator": "cpu", "devices": processes} | ({"strategy": strategy_of(kind)} if processes > 1 else {})
    result = unlearn(Sharding(), FORGET, method=method, data=data, trainer=trainer, probe_samples=0, seed=3, force=True)
    return torch.cat([one.detach().flatten() for one in result.model.parameters()]).tolist(), result.notes


@pytest.mark.slow
def test_scrub_r_goes_back_to_an_earlier_epoch(gloo_pool):
    alone, notes = scrub_r("FSDP2", 1)
    for weights, same in gloo_pool.run(scrub_r, "FSDP2", 2):
        assert same == notes
        assert torch.allclose(torch.tensor(weights), torch.tensor(alone), rtol=1e-4, atol=1e-6)


class Normed(LightningModule):
    """BatchNorm, tied weights, a frozen parameter beside what is sharded, and one layer in eval mode."""

    def __init__(self, width=6):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, width))
        self.net.append(nn.Linear(width, width))
        self.net[4].weight = self.net[3].weight
        self.net.append(nn.Linear(width, CLASSES))
        self.net[2].eval()
        self.free = nn.Parameter(torch.ones(1), requires_grad=False)

    def configure_model(self):
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.net(x) * self.free

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(parameters, lr=0.1)


def run(kind, model, method, **kwargs):
    warnings.simplefilter("ignore")
    strategy = CpuFSDPStrategy() if kind == "FSDP1" else strategy_of(kind)
    trainer = {"accelerator": "cpu", "devices": 2, "strategy": strategy, **kwargs.pop("trainer", {})}
    data = DataLoader(dataset(), ROWS // 2, shuffle=True)
    return unlearn(model, FORGET, method=method, data=data, trainer=trainer, seed=3, **kwargs)


def brought_back(kind):
    seed_everything(0, verbose=False)
    model = Normed()
    given = {name: value.clone() for name, value in model.state_dict().items()}
    result = run(kind, model, FineTune(max_steps=3), force=True)
    found = result.model
    assert type(found) is Normed
    assert not is_sharded(found)
    assert not is_sharded(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in given.items())
    assert [name for name, _ in found.named_modules()] == [name for name, _ in model.named_modules()]
    assert found.net[4].weight is found.net[3].weight
    assert not found.free.requires_grad
    assert found.hparams == model.hparams
    assert [one.training for one in found.modules()] == [one.training for one in model.modules()]
    assert not torch.equal(found.net[1].running_mean, model.net[1].running_mean)
    assert int(found.net[1].num_batches_tracked) == 3
    assert found.device_mesh is None
    assert found._trainer is None
    stage = result.stages[0]
    assert stage.steps == 3
    assert stage.relative_change > 0
    assert stage.probe_after["loss"] != stage.probe_before["loss"]
    return {name: value.tolist() for name, value in found.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_comes_back_whole_with_its_statistics(gloo_pool, kind):
    zero, one = gloo_pool.run(brought_back, kind)
    assert zero == one


def rolled_back(kind):
    seed_everything(0, verbose=False)
    model = Sharding()
    method = GradientAscent(max_steps=3, stop=None)
    result = run(kind, model, method, thresholds=ProbeThresholds(-1.0, -1.0))  # whatever happens is damage
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), result.model.parameters(), strict=True))
    forced = run(kind, model, method, then=FineTune(max_steps=2), force=True)
    return result.rolled_back, same, is_sharded(result.candidate), [stage.steps for stage in forced.stages]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_model_is_rolled_back_and_a_repair_is_sharded_anew(gloo_pool, kind):
    assert gloo_pool.run(rolled_back, kind) == [(True, True, False, [3, 2])] * 2


def refused():
    sharded = Sharding()
    fully_shard(sharded.net)
    with pytest.raises(UnsupportedStrategyError) as given:
        run("FSDP2", sharded, FineTune(max_steps=1))
    with pytest.raises(UnsupportedStrategyError) as procedure:
        run("FSDP2", Sharding(), METHODS["ExactUnlearningK"](), trainer={"max_steps": 1})
    return str(given.value), str(procedure.value)


def test_what_cannot_run_sharded_is_refused(gloo_pool):
    for given, procedure in gloo_pool.run(refused):
        assert "sharded already" in given
        assert "checkpoint" in given
        assert "ExactUnlearningK" in procedure
        assert "ModelParallelStrategy" in procedure


def test_a_module_that_can_shard_itself_runs_on_one_process():
    with pytest.warns(UnlearningWarning, match="validation data"):
        result = unlearn(
            Sharding(),
            FORGET,
            method=GradientAscent(max_steps=1),
            data=DataLoader(dataset(), ROWS),
            trainer={"accelerator": "cpu", "devices": 1},
            force=True,
            probe_samples=0,
        )
    assert result.stages[0].steps == 1


def test_the_list_of_methods_is_complete():
    loss_methods = {name for name, cls in METHODS.items() if issubclass(cls, LossMethod)}
    assert REFUSED["FSDP1"] < loss_methods
    assert REFUSED["FSDP2"] < loss_methods
    assert Retrain.name not in loss_methods
