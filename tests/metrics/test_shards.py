"""Metrics of models that are in pieces on two processes equal those of the whole models on one."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_unlearn import metrics as package
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.metrics import (
    ActivationDistance,
    BiasRemovalError,
    KLToReference,
    ThresholdAttack,
    UnlearningError,
    UnlearningMetrics,
    VerificationError,
)
from tests.helpers.metric_contract import assert_same
from tests.helpers.sharding import cpu_mesh, lay_out
from tests.metrics.test_contract import CASES, labels, random

OF_MODELS = [name for name, case in CASES.items() if isinstance(case.updates[0][0][0], dict)]
"""Cases whose updates take weights by name."""


def laid_out(cls, init, updates, sides):
    """Run inside the pool: the value for weights in pieces; three rows and three entries do not split evenly."""
    with cpu_mesh(2) as mesh:

        def spread(weights):
            return {name: lay_out(tensor, mesh, [Shard(0)]) for name, tensor in weights.items()}

        if "start" in sides and "relative_to" in init:
            init = {**init, "relative_to": spread(init["relative_to"])}
        metric = cls(**init)
        for pair, kwargs in updates:
            pieces = [spread(one) if side in sides else one for side, one in zip(("left", "right"), pair, strict=True)]
            metric.update(*pieces, **kwargs)
        return metric.compute(), metric.pairs


def test_the_cases_of_models_are_those_of_weights():
    assert {CASES[name].cls for name in OF_MODELS} == {VerificationError, UnlearningError}
    assert {one.__name__ for one in (VerificationError, UnlearningError)} <= set(package.__all__)


@pytest.mark.parametrize("sides", [("left", "right", "start"), ("left",), ("right", "start")], ids="-".join)
@pytest.mark.parametrize("name", OF_MODELS)
def test_weights_in_pieces_give_the_value_of_whole_ones(name, sides, gloo_pool):
    case = CASES[name]
    for value, pairs in gloo_pool.run(laid_out, case.cls, case.init, case.updates, sides):
        assert_same(value, case.filled().compute(), rtol=1e-12, atol=0.0)
        assert pairs == len(case.updates)


def net(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))


# What is fed with the answers of two models to some samples and with labels: name -> (metric, update)
OF_ANSWERS = {
    "KLToReference": (KLToReference, lambda metric, ours, theirs, y: metric.update(ours, theirs)),
    "ActivationDistance": (ActivationDistance, lambda metric, ours, theirs, y: metric.update(ours, theirs)),
    "BiasRemovalError": (BiasRemovalError, lambda metric, ours, theirs, y: metric.update(ours, y)),
    "ThresholdAttack": (
        lambda: ThresholdAttack(min_samples=5),
        lambda metric, ours, theirs, y: (
            metric.update(ours[::2], y[::2], split="forget"),
            metric.update(ours[1::2], y[1::2], split="test"),
        ),
    ),
    "UnlearningMetrics": (
        lambda: UnlearningMetrics(num_classes=3),
        lambda metric, ours, theirs, y: metric.update(ours, y, split="retain"),
    ),
}


def of_answers(sharded):
    """Inside the pool: each process has every second batch, and both pass the same number of batches."""
    rank, world = (torch.distributed.get_rank(), 2) if sharded else (0, 1)
    ours, theirs = net(0), net(1)
    for model in (ours, theirs) if sharded else ():
        for layer in (model[0], model[2], model):
            fully_shard(layer)
    made = {name: metric() for name, (metric, _) in OF_ANSWERS.items()}
    with torch.no_grad():
        for number in range(rank, 4, world):
            x, y = random(5 + number, 6), labels(5 + number)
            for name, (_, update) in OF_ANSWERS.items():
                update(made[name], ours(x), theirs(x), y)
    found = {name: metric.compute() for name, metric in made.items()}
    for model in (ours, theirs) if sharded else ():
        model.reshard()
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    weights = VerificationError()
    weights.update(ours, theirs)
    return {**found, "VerificationError": weights.compute()}


def test_answers_of_models_in_pieces_give_the_values_of_one_process(gloo_pool):
    expected = of_answers(False)
    for found in gloo_pool.run(of_answers, True):
        assert_same(found, expected, rtol=1e-5, atol=1e-7)


def in_pieces(placement):
    metric = KLToReference()
    with cpu_mesh(2) as mesh:
        logits = lay_out(random(4, 4), mesh, [placement])
        try:
            metric.update(logits, random(4, 4))
            metric.compute()
        except UnsupportedStrategyError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("placement", [Shard(1), Replicate()])
@pytest.mark.filterwarnings("ignore:.*refused an update")
def test_answers_in_pieces_are_refused_by_name(placement, gloo_pool):
    """As of a head that tensor parallelism has cut by class."""
    for message in gloo_pool.run(in_pieces, placement):
        assert "to be whole tensors, but got 'a DTensor'. Call its full_tensor()" in message
