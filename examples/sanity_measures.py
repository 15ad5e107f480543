"""Every metric of the package as one number of a model beside a reference, for `metric_sanity.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compare_data import Task, network_for
from lightning import LightningModule
from sanity_models import CLASS
from torch import Tensor

from lightning_unlearn import metrics
from lightning_unlearn.functional.decision_regions import BallSampling, region_points
from lightning_unlearn.functional.membership import cross_entropy_per_sample

__all__ = ["GROUP_READINGS", "NO_READING", "READINGS", "Case", "Scene", "Seen", "look", "make_scene"]

MEASURED = 100
"""At most so many forgotten samples are looked at: what a class has more of would only cost time."""

PAIR = (2, 3)
"""The classes of the interclass confusion: their labels are swapped in the scenario with wrong labels."""


@dataclass(frozen=True)
class Scene:
    """What models are looked at with in one scenario.

    Attributes:
        task: Data set and forget set.
        images: By part: `forget`, `retain`, `test` (classes that are kept), `held_out` (what the forget set is
            compared with in attacks: test images of its class, or of all), `near` (points around forgotten samples).
        labels: Of the first four parts, those of training for `forget`.
    """

    task: Task
    images: dict[str, Tensor]
    labels: dict[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """A model and its outputs, by part."""

    module: LightningModule
    logits: dict[str, Tensor]


def make_scene(task: Task, scenario: str) -> Scene:
    """Parts of the data for one scenario."""
    images, labels = task.train.tensors
    forget = torch.tensor(task.forget)
    kept = torch.ones(len(images), dtype=torch.bool)
    kept[forget] = False
    chosen = forget[:MEASURED]
    test_x, test_y = task.test.tensors
    mine = test_y == CLASS if scenario == "class" else torch.ones_like(test_y, dtype=torch.bool)
    rest = test_y != CLASS if scenario == "class" else mine
    points = region_points(images[chosen[:40]], test_x, sampling=BallSampling(radius=1.0, points=10))
    parts = {
        "forget": (images[chosen], labels[chosen]),
        "retain": (images[kept][:1000], labels[kept][:1000]),
        "test": (test_x[rest], test_y[rest]),
        "held_out": (test_x[mine], test_y[mine]),
    }
    pictures = {name: part[0] for name, part in parts.items()}
    return Scene(task, {**pictures, "near": torch.cat(list(points))}, {name: part[1] for name, part in parts.items()})


@torch.no_grad()
def look(scene: Scene, weights: Mapping[str, Tensor] | None) -> Seen:
    """A model with these weights, or one with random ones, and what it answers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = network_for(scene.task)()
    if weights is not None:
        module.load_state_dict(weights)
    module.eval()
    return Seen(module, {part: module(images) for part, images in scene.images.items()})


@dataclass(frozen=True)
class Case:
    """One model to measure.

    Attributes:
        scene: The scenario.
        model: Under test.
        reference: The retrained model.
        before: Another original, from another seed.
        shadow: A retrained model with no other part.
        blank: An untrained model.
    """

    scene: Scene
    model: Seen
    reference: Seen
    before: Seen
    shadow: Seen
    blank: Seen


Reading = Callable[[Case], float]


def _pair(metric: Any) -> Reading:
    """Of a metric of the logits of two models on the forget set."""

    def read(case: Case) -> float:
        found = metric()
        found.update(case.model.logits["forget"], case.reference.logits["forget"])
        return float(found.compute())

    return read


def _accuracies(metric: Any) -> Reading:
    def read(case: Case) -> float:
        found = metric()
        for split in ("forget", "retain", "test"):
            outputs = case.model.logits[split], case.reference.logits[split]
            found.update(*outputs, case.scene.labels[split], split=split)
        return float(found.compute())

    return read


def _bias(case: Case) -> float:
    found = metrics.BiasRemovalError()
    found.update(case.model.logits["forget"], case.scene.labels["forget"])
    return float(found.compute())


def _regions(case: Case) -> float:
    found = metrics.DecisionRegionChange()
    for part, near in (("near", True), ("held_out", False)):
        found.update(case.before.logits[part], case.model.logits[part], near=near)
    return float(found.compute()["near_change"])


def _shares(make: Callable[[], Any], *, labels: bool) -> Reading:
    """Of an attack that is trained on retain against held-out samples and asked about the forget set."""

    def read(case: Case) -> float:
        found = make()
        for split in ("forget", "retain", "test"):
            given = (case.scene.labels[split],) if labels else ()
            found.update(case.model.logits[split], *given, split=split)
        return float(found.compute()["forget_member_share"])

    return read


def _losses(make: Callable[[], Any], key: str | None = None) -> Reading:
    """Of an attack on the losses of forgotten against held-out samples."""

    def read(case: Case) -> float:
        found = make()
        for split, part in (("forget", "forget"), ("test", "held_out")):
            logits, labels = case.model.logits[part], case.scene.labels[part]
            found.update(cross_entropy_per_sample(logits, labels), split=split)
        value = found.compute()
        return float(value if key is None else value[key])

    return read


def _threshold(case: Case) -> float:
    found = metrics.ThresholdAttack(score="modified_entropy")
    for split, part in (("forget", "forget"), ("test", "held_out")):
        found.update(case.model.logits[part], case.scene.labels[part], split=split)
    return float(found.compute()["membership_auroc"])


def _risk(case: Case) -> float:
    found = metrics.PrivacyRiskScore()
    found.update(case.model.logits["forget"], case.scene.labels["forget"], group="target")
    for part, group in (("retain", "shadow_member"), ("test", "shadow_nonmember")):
        found.update(case.shadow.logits[part], case.scene.labels[part], group=group)
    return float(found.compute())


def _confusion(case: Case) -> float:
    found = metrics.InterclassConfusion(num_classes=10, classes=PAIR)
    test_x, test_y = case.model.logits["test"], case.scene.labels["test"]
    found.update(test_x, test_y)
    return float(found.compute()["ic_error"])


def _forget_accuracy(case: Case) -> float:
    found = metrics.UnlearningMetrics(num_classes=10)
    found.update(case.model.logits["forget"], case.scene.labels["forget"], split="forget")
    return float(found.compute()["forget_accuracy"])


def _weights(case: Case) -> float:
    found = metrics.VerificationError()
    found.update(case.model.module, case.reference.module)
    return float(found.compute())


def _zero_retrain(case: Case) -> float:
    found = metrics.ZeroRetrainForgetting()
    found.update(case.model.logits["forget"], case.blank.logits["forget"])
    return float(found.compute())


READINGS: dict[str, Reading] = {
    "ActivationDistance": _pair(metrics.ActivationDistance),
    "AverageGap": _accuracies(metrics.AverageGap),
    "BiasRemovalError": _bias,
    "DecisionRegionChange": _regions,
    "EntropyAttack": _shares(metrics.EntropyAttack, labels=False),
    "InterclassConfusion": _confusion,
    "JSToReference": _pair(metrics.JSToReference),
    "KLToReference": _pair(metrics.KLToReference),
    "LogisticAttack": _losses(lambda: metrics.LogisticAttack(clip=100.0)),
    "LossThresholdAttack": _losses(metrics.LossThresholdAttack, "membership_auroc"),
    "PrivacyRiskScore": _risk,
    "SupportVectorAttack": _shares(lambda: metrics.SupportVectorAttack(feature="confidence"), labels=True),
    "ThresholdAttack": _threshold,
    "TugOfWar": _accuracies(metrics.TugOfWar),
    "UnlearningMetrics": _forget_accuracy,
    "VerificationError": _weights,
    "ZeroRetrainForgetting": _zero_retrain,
}
"""Metrics of one model."""


def _groups(
    make: Callable[[], Any], key: str | None = None
) -> Callable[[Scene, Sequence[Seen], Sequence[Seen]], float]:
    def read(scene: Scene, models: Sequence[Seen], references: Sequence[Seen]) -> float:
        found = make()
        for group, members in (("unlearned", models), ("retrained", references)):
            for number, one in enumerate(members):
                found.update(one.logits["forget"], scene.labels["forget"], group=group, model=number)
        value = found.compute()
        return float(value if key is None else value[key])

    return read


GROUP_READINGS = {
    "KLOM": _groups(metrics.KLOM),
    "ForgettingScore": _groups(metrics.ForgettingScore),
    "ULiRA": _groups(lambda: metrics.ULiRA(folds=2), "u_lira_accuracy"),
}
"""Metrics of a group of models against a group of retrained ones."""

NO_READING: dict[tuple[str, str], str] = {
    **{
        ("UnlearningError", scenario): "is of a training run, and looks at no forget set"
        for scenario in ("mislabelled", "class", "random")
    },
    **{("BiasRemovalError", scenario): "needs wrong labels" for scenario in ("class", "random")},
    ("PrivacyRiskScore", "class"): "no shadow members of the class without a shadow model that saw it",
}
"""Metric and scenario -> why there is nothing to measure."""
