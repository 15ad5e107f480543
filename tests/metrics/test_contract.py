"""Every metric through one contract, in one process and in two."""

import matplotlib as mpl
import pytest
import torch
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC
from torchmetrics.utilities import dim_zero_cat

import lightning_unlearn.metrics as package
from lightning_unlearn.functional.membership import cross_entropy_per_sample
from lightning_unlearn.metrics import (
    KLOM,
    ActivationDistance,
    AverageGap,
    BiasRemovalError,
    DecisionRegionChange,
    EntropyAttack,
    ForgettingScore,
    InterclassConfusion,
    JSToReference,
    KLToReference,
    LogisticAttack,
    LossThresholdAttack,
    PrivacyRiskScore,
    SupportVectorAttack,
    ThresholdAttack,
    TugOfWar,
    ULiRA,
    UnlearningError,
    UnlearningMetrics,
    VerificationError,
    ZeroRetrainForgetting,
)
from tests.helpers.metric_contract import CHECKS, MetricCase, assert_same, check_two_processes, two_process_values

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


SPLITS = (("test", 9), ("forget", 7), ("retain", 12), ("test", 1), ("forget", 5), ("retain", 3), ("test", 6))
"""Of an attack's samples: uneven batches, ten retain and held-out samples after the fourth, not before."""


def attacked(*splits, targets=True):
    """Logits, of retain samples surer and of held-out samples less sure ones."""
    scale = {"retain": 3.0, "forget": 2.0, "test": 1.0}
    updates = []
    for split, size in SPLITS:
        logits = random(size, 3) + scale[split] * torch.nn.functional.one_hot(labels(size), 3)
        if split in splits:
            updates.append(((logits, labels(size)) if targets else (logits,), {"split": split}))
    return updates


def held_out_losses():
    updates = attacked("forget", "test")
    return [((cross_entropy_per_sample(*predictions),), split) for predictions, split in updates]


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


def gaps():
    """Logits of one model and class numbers of the other; every split in batches of uneven size."""
    splits = ("forget", "retain", "test", "retain", "test")
    return [
        ((random(size, 3), labels(size + 1)[1:], labels(size)), {"split": split})
        for size, split in zip(SIZES, splits, strict=True)
    ]


def confusions():
    """Logits, class numbers, and a batch that holds neither of the two classes."""
    batches = [(random(size, 4), torch.arange(size) % 4) for size in SIZES]
    return [(batch, {}) for batch in (*batches, (torch.tensor([0, 1, 3]), torch.tensor([3, 3, 2])))]


def regions():
    return [
        ((random(size, 3), random(size + 1, 3)[1:]), {"near": near})
        for size, near in zip(SIZES, (True, False, True, False, False), strict=True)
    ]


class MedianDistance(Metric):
    """A user's own metric: no mean of batches or processes gives its value."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("distances", [], dist_reduce_fx="cat")

    def update(self, preds, target):
        self.distances.append((preds - target).abs())

    def compute(self):
        return dim_zero_cat(self.distances).median()


CASES = {
    "KLToReference": MetricCase(KLToReference, logit_pairs()),
    "JSToReference": MetricCase(JSToReference, logit_pairs()),
    "ActivationDistance": MetricCase(ActivationDistance, logit_pairs()),
    "ActivationDistance-l1": MetricCase(ActivationDistance, logit_pairs(), {"norm": "l1"}),
    "ZeroRetrainForgetting": MetricCase(ZeroRetrainForgetting, logit_pairs()),
    "ZeroRetrainForgetting-official": MetricCase(ZeroRetrainForgetting, logit_pairs(), {"form": "official"}),
    "TugOfWar": MetricCase(TugOfWar, gaps()),
    "AverageGap": MetricCase(AverageGap, gaps()),
    "InterclassConfusion": MetricCase(InterclassConfusion, confusions(), {"num_classes": 4, "classes": (1, 0)}),
    "BiasRemovalError": MetricCase(BiasRemovalError, [((random(size, 3), labels(size)), {}) for size in SIZES]),
    "DecisionRegionChange": MetricCase(DecisionRegionChange, regions()),
    "VerificationError": MetricCase(VerificationError, pairs()),
    "VerificationError-relative": MetricCase(VerificationError, pairs(), {"relative_to": weights(50)}),
    "VerificationError-layers": MetricCase(
        VerificationError, pairs(), {"relative_to": weights(50), "layers": ["a.bias", "a.weight"]}
    ),
    "UnlearningError": MetricCase(UnlearningError, runs()),
    "UnlearningError-relative": MetricCase(UnlearningError, runs(), {"relative": True, "buffers": "include"}),
    "UnlearningError-layers": MetricCase(UnlearningError, runs(), {"layers": ["a.weight"]}),
    "LossThresholdAttack": MetricCase(LossThresholdAttack, attacks(), {"min_samples": 2}),
    "ThresholdAttack": MetricCase(ThresholdAttack, attacked("forget", "test"), {"min_samples": 2}),
    "ThresholdAttack-modified": MetricCase(
        ThresholdAttack, attacked("forget", "test"), {"score": "modified_entropy", "min_samples": 5}
    ),
    "LogisticAttack": MetricCase(LogisticAttack, held_out_losses()),
    "LogisticAttack-scrub": MetricCase(LogisticAttack, held_out_losses(), {"n_splits": 5, "clip": 100.0, "seed": 3}),
    "SupportVectorAttack": MetricCase(SupportVectorAttack, attacked("forget", "retain", "test")),
    "SupportVectorAttack-probabilities": MetricCase(
        SupportVectorAttack, attacked("forget", "retain", "test"), {"feature": "probabilities", "seed": 1}
    ),
    "EntropyAttack": MetricCase(EntropyAttack, attacked("forget", "retain", "test", targets=False)),
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
    "UnlearningMetrics-multilabel": MetricCase(
        UnlearningMetrics,
        routed(lambda size: random(size, 4), lambda size: (random(size + 1, 4)[1:] > 0).long()),
        {"task": "multilabel", "num_labels": 4},
    ),
    "UnlearningMetrics-missing-classes": MetricCase(
        UnlearningMetrics,
        routed(lambda size: random(size, 6), labels),
        {"base": MulticlassAccuracy(num_classes=6, average="macro")},
    ),
    "UnlearningMetrics-users-own": MetricCase(
        UnlearningMetrics, routed(lambda size: random(size), lambda size: random(size) + 1), {"base": MedianDistance()}
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


@pytest.mark.slow
def test_four_processes_give_the_value_of_one(four_processes):
    """A few, one of every way to keep a state; of four processes one has nothing."""
    for name in ("KLToReference", "InterclassConfusion", "SupportVectorAttack", "KLOM", "VerificationError-layers",
                 "UnlearningMetrics-list-states", "PrivacyRiskScore"):  # fmt: skip
        case = CASES[name]
        expected = case.filled().compute()
        owners = [(0, 3, 1)[number % 3] for number in range(len(case.updates))]
        for first, again in four_processes.run(two_process_values, owners, case.cls, case.init, case.updates):
            assert_same(first, expected, rtol=1e-6, atol=1e-12)
            assert_same(again, expected, rtol=1e-6, atol=1e-12)
