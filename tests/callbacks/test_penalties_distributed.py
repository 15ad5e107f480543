"""Penalties in two processes: DDP, and weights sharded by `ModelParallelStrategy`, equal the term in the step."""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from lightning_unlearn.callbacks.standard_deviation_penalty import StandardDeviationPenalty
from lightning_unlearn.callbacks.weight_change_penalty import WeightChangePenalty
from lightning_unlearn.exceptions import UnsupportedStrategyError
from tests.callbacks.penalised import GAMMA, STRENGTH, Plain, deviation
from tests.helpers.models import IdDataset, loader, quiet_trainer


class Net(nn.Module):
    """Seven hidden units: shards of two processes differ in size, and the bias of the head has three entries."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.hidden(x).relu())


class Module(Plain):
    """Shards itself, or not, and may have both terms in its step."""

    own, sharded = False, False

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.net = Net()
        self.start = [one.detach().clone() for one in self.parameters()]

    def configure_model(self):
        if self.sharded:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.hidden, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        logits = self(batch["x"])
        loss = functional.cross_entropy(logits, batch["y"])
        if self.own:
            pairs = zip(self.parameters(), self.start, strict=True)
            loss = loss + GAMMA * deviation(logits) + STRENGTH * sum((one - at).pow(2).sum() for one, at in pairs)
        return loss

    def validation_step(self, batch, batch_idx):
        self(batch["x"])


def train(kind, own, folder=None, resume=None, **settings):
    """Run inside the pool: the final weights, the logged terms, and which callbacks' states a checkpoint has."""
    module = Module()
    module.own, module.sharded = own, kind == "sharded"
    penalties = [StandardDeviationPenalty(GAMMA), WeightChangePenalty(STRENGTH)]
    strategy = (
        ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        if module.sharded
        else DDPStrategy(process_group_backend="gloo")
    )
    defaults = {"strategy": strategy, "devices": 2, "callbacks": [] if own else penalties, "max_epochs": 2}
    trainer = quiet_trainer(**{**defaults, **settings})
    validation = loader(IdDataset(4), batch_size=2, shuffle=False)
    trainer.fit(module, loader(IdDataset(24), batch_size=4, shuffle=False), validation, ckpt_path=resume)
    weights = {
        name: getattr(one, "full_tensor", lambda one=one: one)().detach() for name, one in module.named_parameters()
    }
    if folder is not None:
        trainer.save_checkpoint(f"{folder}/checkpoint")
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    anchors = None if own else penalties[1].state_dict()["anchor"]["values"]
    return weights, logged, anchors


def differ(left, right):
    return max(float((left[name] - right[name]).abs().max()) for name in right)


SETTINGS = {
    "plain": {},
    "accumulated-clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_equals_the_term_in_the_step(gloo_pool, kind, setting):
    settings = dict(SETTINGS[setting])
    if kind == "sharded":
        settings.pop("gradient_clip_algorithm", None)
        settings.pop("gradient_clip_val", None)
    (found, logged, anchors), (other, logged_there, _) = gloo_pool.run(train, kind, False, **settings)
    expected = gloo_pool.run(train, "replicated", True, **settings)[0][0]
    assert differ(found, other) == 0.0
    assert differ(found, expected) < 1e-6
    # The distance is that of the whole model on every process, also where each has a part.
    start = dict(Module().named_parameters())
    assert logged["weight_change_penalty"] == pytest.approx(logged_there["weight_change_penalty"], rel=1e-6)
    assert logged["weight_change_penalty"] > 0
    assert {name: tuple(one.shape) for name, one in anchors.items()} == {n: tuple(p.shape) for n, p in start.items()}
    assert differ(anchors, {name: one.detach() for name, one in start.items()}) == 0.0


def last_distance(kind):
    """The term logged in the third step, and the distance after two steps computed from the weights."""
    _, logged, _ = train(kind, False, max_steps=3, max_epochs=-1)
    weights, _, anchors = train(kind, False, max_steps=2, max_epochs=-1)
    return logged["weight_change_penalty"], STRENGTH * sum(
        float((weights[n] - anchors[n]).pow(2).sum()) for n in anchors
    )


def test_the_logged_value_is_that_of_the_whole_model(gloo_pool):
    for logged, computed in gloo_pool.run(last_distance, "sharded"):
        assert logged == pytest.approx(computed, rel=1e-5)


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_a_resumed_training_has_the_anchor_of_the_whole_one(gloo_pool, kind, tmp_path):
    whole = gloo_pool.run(train, kind, False, max_epochs=3)[0][0]
    gloo_pool.run(train, kind, False, str(tmp_path), max_epochs=1)
    resumed = gloo_pool.run(train, kind, False, None, f"{tmp_path}/checkpoint", max_epochs=3)[0][0]
    assert differ(resumed, whole) < 1e-7


def test_flat_shards_are_refused_by_name(monkeypatch):
    trainer = quiet_trainer()
    monkeypatch.setattr(trainer.strategy, "__class__", FSDPStrategy)
    with pytest.raises(UnsupportedStrategyError, match=r"FSDPStrategy.*ModelParallelStrategy"):
        WeightChangePenalty(1.0).setup(trainer, Module(), "fit")
    StandardDeviationPenalty(1.0).setup(trainer, Module(), "fit")
