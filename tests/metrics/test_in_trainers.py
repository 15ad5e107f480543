"""Metrics in a user's own `test_step`, with real Trainers: on two processes what one process gives."""

import warnings

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.data.padding import own_samples
from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.functional.membership import cross_entropy_per_sample
from lightning_unlearn.metrics import (
    ActivationDistance,
    KLToReference,
    LossThresholdAttack,
    SupportVectorAttack,
    UnlearningMetrics,
    VerificationError,
)
from tests.helpers.models import quiet_trainer

SPLITS = ("forget", "retain", "test")
SIZES = (21, 40, 33)
STRATEGIES = ("ddp", "sharded")


def net(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))


class Audited(LightningModule):
    """Two models; `KLToReference` is logged as an object, the others by their values."""

    def __init__(self, sharded, bad=False):
        super().__init__()
        self.sharded, self.bad = sharded, bad
        self.net, self.retrained = net(0), net(1)
        self.kl = KLToReference()
        self.distance = ActivationDistance()
        self.accuracies = UnlearningMetrics(num_classes=3)
        self.attack = LossThresholdAttack()
        self.support = SupportVectorAttack()
        self.weights = VerificationError()

    def configure_model(self):
        if self.sharded:
            mesh = self.device_mesh["data_parallel"]
            for model in (self.net, self.retrained):
                for layer in (model[0], model[2], model):
                    fully_shard(layer, mesh=mesh)

    def on_test_start(self):
        assert self.sharded == any(isinstance(one, DTensor) for one in self.net.parameters())
        self.weights.update(self.net, self.retrained)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        logits, right = self.net(x), self.retrained(x)
        own = own_samples(self.trainer.test_dataloaders[dataloader_idx], batch_idx, len(y))
        logits, right, y = logits[own], right[own], y[own]
        self.accuracies.update(logits, y, dataloader_idx=dataloader_idx)
        split = SPLITS[dataloader_idx]
        self.support.update(logits, y, split=split)
        if split != "retain":
            losses = cross_entropy_per_sample(logits, y)
            self.attack.update(losses * torch.nan if self.bad and self.global_rank else losses, split=split)
        if split == "forget":
            self.distance.update(logits, right)
            self.kl.update(logits, right)
            self.log("kl", self.kl, on_step=False, on_epoch=True, add_dataloader_idx=False)

    def on_test_epoch_end(self):
        named = {"distance": self.distance.compute(), "weights": self.weights.compute()}
        self.log_dict({**named, **self.accuracies.compute(), **self.attack.compute(), **self.support.compute()})


def data():
    loaders = []
    for size in SIZES:
        generator = torch.Generator().manual_seed(size)
        x = torch.randn(size, 6, generator=generator)
        loaders.append(DataLoader(TensorDataset(x, torch.randint(0, 3, (size,), generator=generator)), batch_size=4))
    return loaders


def audited(kind, bad=False):
    strategy = {
        "one": "auto",
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "sharded": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
    }[kind]
    trainer = quiet_trainer(strategy=strategy, devices=1 if kind == "one" else 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = trainer.test(Audited(kind == "sharded", bad), data(), verbose=False)
        except Exception as error:
            return type(error), str(error)
    return {name: value for one in found for name, value in one.items()}


@pytest.fixture(scope="module")
def alone():
    return audited("one")


@pytest.mark.parametrize("kind", STRATEGIES)
def test_values_are_those_of_one_process(gloo_pool, kind, alone):
    names = {"kl", "distance", "weights", "membership_auroc", "forget_accuracy", "forget_member_share"}
    assert names <= alone.keys()
    for found in gloo_pool.run(audited, kind):
        assert found.keys() == alone.keys()
        assert found == pytest.approx(alone, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_data_that_are_bad_on_one_process_end_the_test_on_both(gloo_pool, kind):
    """No process is left in a forward pass or in the gathering of a state."""
    (healthy, said), (ill, own) = gloo_pool.run(audited, kind, True)
    assert (healthy, ill) == (LightningUnlearnError, ValueError)
    assert "updates of LossThresholdAttack" in said
    assert own in said


def test_the_values_of_one_process_are_those_by_hand(alone):
    model = net(0)
    for split, loader in zip(SPLITS, data(), strict=True):
        x, y = loader.dataset.tensors
        right = (model(x).argmax(1) == y).double().mean()
        assert alone[f"{split}_accuracy"] == pytest.approx(float(right), abs=1e-7)
