"""Every metric through one contract, in one process and in two."""

import matplotlib as mpl
import pytest
import torch
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAUROC

import lightning_unlearn.metrics as package
from lightning_unlearn.metrics import (
    KLOM,
    ForgettingScore,
    JSToReference,
    KLToReference,
    LossThresholdAttack,
    PrivacyRiskScore,
    ULiRA,
    UnlearningError,
    UnlearningMetrics,
    VerificationError,
)
from tests.helpers.metric_contract import CHECKS, MetricCase, check_two_processes

SIZES = (8, 8, 3, 1, 5)
"""Uneven batches, the smallest of one sample."""


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def logit_pairs():
    return [((random(size, 4), random(size, 4) * 2 + 1), {}) for size in SIZES]


def routed(predictions, targets):
    splits = ("forget", "retain", "test", "retain", "retain")
    return [((predictions(size), targets(size)), {"split": split}) for size, split in zip(SIZES, splits, strict=True)]


def attacks():
    """Batches of only members, only held-out samples, and both."""
    updates = [((random(size).exp(),), {"split": split}) for size, split in ((6, "forget"), (9, "test"), (1, "test"))]
    mask = torch.tensor([True, False, True, True])
    return [*updates, ((random(4).exp(), mask), {})]


def risks():
    """One group a batch; each group in batches of uneven size, with every class in both shadow groups."""
    sizes = {"shadow_member": (9, 6), "target": (4, 1), "shadow_nonmember": (3, 8)}
    return [((random(size, 3) * 2, labels(size)), {"group": group}) for group, pair in sizes.items() for size in pair]


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(3, 4, generator=generator), "a.bias": torch.randn(3, generator=generator)}


def pairs():
    return [((weights(number), weights(number + 9)), {}) for number in range(4)]


def runs():
    """Trainings of different length and learning rate."""
    settings = [{"lr": 0.1 * (number + 1), "steps": number + 2, "singular_value": 3.0} for number in range(4)]
    return [(sides, setting) for (sides, _), setting in zip(pairs(), settings, strict=True)]


def many_models(sizes=(5, 4), samples=3):
    """One model a batch, the groups taking turns and of uneven size, numbered backwards."""
    generator = torch.Generator().manual_seed(8)
    numbered = [
        (group, model) for group, size in zip(("unlearned", "retrained"), sizes, strict=True) for model in range(size)
    ]
    return [
        ((torch.randn(samples, 3, generator=generator) * 2, labels(samples)), {"group": group, "model": model})
        for group, model in sorted(numbered, key=lambda one: -one[1])
    ]


def labels(size):
    return torch.arange(size) % 3


CASES = {
    "KLToReference": MetricCase(KLToReference, logit_pairs()),
    "JSToReference": MetricCase(JSToReference, logit_pairs()),
    "VerificationError": MetricCase(VerificationError, pairs()),
    "VerificationError-relative": MetricCase(VerificationError, pairs(), {"relative_to": weights(50)}),
    "VerificationError-layers": MetricCase(
        VerificationError, pairs(), {"relative_to": weights(50), "layers": ["a.bias", "a.weight"]}
    ),
    "UnlearningError": MetricCase(UnlearningError, runs()),
    "UnlearningError-relative": MetricCase(UnlearningError, runs(), {"relative": True, "buffers": "include"}),
    "UnlearningError-layers": MetricCase(UnlearningError, runs(), {"layers": ["a.weight"]}),
    "LossThresholdAttack": MetricCase(LossThresholdAttack, attacks(), {"min_samples": 2}),
    "PrivacyRiskScore": MetricCase(PrivacyRiskScore, risks()),
    "KLOM": MetricCase(KLOM, many_models(), {"bins": 5}),
    "ULiRA": MetricCase(ULiRA, many_models(), {"folds": 2}),
    "ForgettingScore": MetricCase(ForgettingScore, many_models(), {"resolution": 20}),
    "UnlearningMetrics": MetricCase(
        UnlearningMetrics, routed(lambda size: random(size, 3), labels), {"num_classes": 3}
    ),
    "UnlearningMetrics-regression": MetricCase(
        UnlearningMetrics,
        routed(lambda size: random(size), lambda size: random(size) + 1),
        {"base": MeanSquaredError()},
    ),
    "UnlearningMetrics-list-states": MetricCase(
        UnlearningMetrics,
        routed(lambda size: random(size + 6, 3).softmax(1), lambda size: labels(size + 6)),
        {"base": MulticlassAUROC(num_classes=3)},
    ),
}


def test_every_metric_has_a_case():
    assert {case.cls.__name__ for case in CASES.values()} == set(package.__all__)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
def test_contract(name, check):
    case = CASES[name]
    mpl.use("agg")
    check(case)
    mpl.pyplot.close("all")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_value_of_one(name, gloo_pool):
    check_two_processes(CASES[name], gloo_pool)
