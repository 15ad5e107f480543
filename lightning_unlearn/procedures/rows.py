"""The rows of an evaluation: every metric for every model, with the value it should have and what that means."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from lightning_unlearn.functional.divergences import activation_distance, js_to_reference, kl_to_reference
from lightning_unlearn.functional.prediction_scores import MembershipScore, membership_score
from lightning_unlearn.functional.score_gaps import SplitScores, average_gap, tug_of_war
from lightning_unlearn.functional.weight_distance import verification_error
from lightning_unlearn.procedures.comparison import Comparison, Metric, noise_floor, rows_of
from lightning_unlearn.procedures.measured import Measured, measured_auroc, measured_mean, measured_share
from lightning_unlearn.procedures.outputs import ModelOutputs
from lightning_unlearn.results import MetricValue, ModelRole, NoiseFloor, Target
from lightning_unlearn.types import Split

__all__ = ["metric_rows"]

_BySplit: TypeAlias = Mapping[Split, ModelOutputs]
_SPLITS: tuple[Split, ...] = ("forget", "retain", "test")


def metric_rows(comparison: Comparison) -> tuple[MetricValue, ...]:
    """Measure everything that can be measured; a metric whose requirements are not met has no row.

    In reading order: scores, what sums them up, distances of answers, membership attacks, distance of weights.
    """
    parts = (_scores, _true_label_accuracy, _summaries, _divergences, _membership, _weights)
    return tuple(row for part in parts for metric in part(comparison) for row in rows_of(metric))


def _accuracy(outputs: ModelOutputs) -> Measured:
    return measured_share(outputs.correct)


def _loss(outputs: ModelOutputs) -> Measured:
    return measured_mean(outputs.losses)


def _confidence(outputs: ModelOutputs) -> Measured:
    return measured_mean(outputs.confidences)


_SCORES: tuple[tuple[str, str, Split, Callable[[ModelOutputs], Measured]], ...] = (
    ("forget_accuracy", "Accuracy on the forget set", "forget", _accuracy),
    ("retain_accuracy", "Accuracy on the retain set", "retain", _accuracy),
    ("test_accuracy", "Accuracy on held-out data", "test", _accuracy),
    ("forget_loss", "Loss on the forget set (nats)", "forget", _loss),
    ("forget_confidence", "Confidence in the forget labels", "forget", _confidence),
)


def _scores(comparison: Comparison) -> Iterator[Metric]:
    """Accuracy on every split, loss and confidence on the forget set."""
    for name, label, split, score in _SCORES:
        if split not in comparison.outputs["original"]:
            continue
        found = {role: score(outputs[split]) for role, outputs in comparison.outputs.items()}
        note = ""
        right: dict[ModelRole, float] = {}
        if comparison.has_retrained:
            right = dict.fromkeys(found, found["retrained"].value)
        elif split == "forget" and not comparison.altered:
            right = {role: score(outputs["test"]).value for role, outputs in comparison.outputs.items()}
            note = "The reference is the model's own value on held-out data."
        others = [score(outputs[split]).value for _, outputs in comparison.references]
        yield Metric(name, label, split, "retrained", found, right, _floor(found, others), note)


def _floor(found: Mapping[ModelRole, Measured], others: Sequence[float]) -> NoiseFloor | None:
    """Over the retrained model and the further ones."""
    return noise_floor([found["retrained"].value, *others]) if "retrained" in found else None


def _true_label_accuracy(comparison: Comparison) -> Iterator[Metric]:
    if not comparison.true_outputs:
        return
    found = {role: _accuracy(outputs) for role, outputs in comparison.true_outputs.items()}
    targets = comparison.true_outputs["original"].targets
    others = [_accuracy(one["forget"].with_targets(targets)).value for _, one in comparison.references]
    right = dict.fromkeys(found, found["retrained"].value) if comparison.has_retrained else {}
    label = "Accuracy on the forget set, true labels"
    yield Metric("true_label_accuracy", label, "forget", "retrained", found, right, _floor(found, others))


_SUMMARIES: tuple[tuple[str, str, Target, Callable[[SplitScores, SplitScores], float], float], ...] = (
    ("tug_of_war", "ToW: agreement of the three accuracies", "high", tug_of_war, 1.0),
    ("average_gap", "Average gap of the three accuracies", "low", average_gap, 0.0),
)


def _summaries(comparison: Comparison) -> Iterator[Metric]:
    """All accuracies in one number; of absolute gaps, which are never below 0, no interval over samples is given."""
    if not comparison.has_retrained or "retain" not in comparison.outputs["original"]:
        return
    scores = {role: _split_scores(outputs) for role, outputs in comparison.outputs.items()}
    others = [_split_scores(outputs) for _, outputs in comparison.references]
    for name, label, target, summary, ideal in _SUMMARIES:
        found = {role: Measured(summary(one, scores["retrained"])) for role, one in scores.items()}
        again = [summary(one, scores["retrained"]) for one in others]
        yield _distance(name, label, None, target, found, again, ideal)


def _split_scores(outputs: _BySplit) -> SplitScores:
    forget, retain, test = (_accuracy(outputs[split]).value for split in _SPLITS)
    return SplitScores(forget, retain, test)


def _distance(
    name: str,
    label: str,
    split: Split | None,
    target: Target,
    found: Mapping[ModelRole, Measured],
    others: Sequence[float],
    ideal: float = 0.0,
) -> Metric:
    """A metric of a model *and* the retrained one: right is what another retraining has, or else the ideal."""
    right = statistics.fmean(others) if others else ideal
    note = "The right value is that of another retraining." if others else ""
    return Metric(name, label, split, target, found, dict.fromkeys(found, right), noise_floor(others), note)


_DIVERGENCES: tuple[tuple[str, str, Split, Callable[[Tensor, Tensor], Tensor]], ...] = (
    ("forget_kl", "KL(retrained || model) on the forget set (nats)", "forget", kl_to_reference),
    ("forget_js", "JS(retrained, model) on the forget set (nats)", "forget", js_to_reference),
    ("forget_activation_distance", "Activation distance (L2) on the forget set", "forget", activation_distance),
    ("test_kl", "KL(retrained || model) on held-out data (nats)", "test", kl_to_reference),
)


def _divergences(comparison: Comparison) -> Iterator[Metric]:
    if not comparison.has_retrained:
        return
    for name, label, split, divergence in _DIVERGENCES:
        retrained = comparison.outputs["retrained"][split].logits
        found = {
            role: measured_mean(divergence(outputs[split].logits, retrained))
            for role, outputs in comparison.outputs.items()
        }
        others = [float(divergence(outputs[split].logits, retrained).mean()) for _, outputs in comparison.references]
        yield _distance(name, label, split, "low", found, others)


_ATTACKS: tuple[tuple[str, str, MembershipScore], ...] = (
    ("membership_auroc", "Membership attack, forget against held-out (AUROC)", "loss"),
    ("confidence_auroc", "Membership attack by confidence (AUROC)", "confidence"),
    ("modified_entropy_auroc", "Membership attack by modified entropy (AUROC)", "modified_entropy"),
)


def _membership(comparison: Comparison) -> Iterator[Metric]:
    """Attacks by a threshold on one score, forget against held-out samples."""
    first = comparison.outputs["original"]
    few = min(len(first["forget"]), len(first["test"])) < comparison.min_members
    if few or not all(_attackable(outputs) for outputs in comparison.outputs.values()):
        return
    others = [outputs for _, outputs in comparison.references]
    for name, label, score in _ATTACKS:
        if score != "loss" and first["forget"].logits.shape[1] < 2:
            continue  # one class leaves no odds
        found = {role: _attack(outputs, score) for role, outputs in comparison.outputs.items()}
        # Held-out samples of the same distribution cannot be told apart; wrong labels can, whatever was seen.
        right: dict[ModelRole, float] = {} if comparison.altered else dict.fromkeys(found, 0.5)
        if comparison.has_retrained:
            right = dict.fromkeys(found, found["retrained"].value)
        # A further model that answers NaN takes the noise floor from the attack, and nothing else.
        floor = None
        if all(map(_attackable, others)):
            floor = _floor(found, [_attack(outputs, score).value for outputs in others])
        yield Metric(name, label, None, "retrained", found, right, floor)


def _attackable(outputs: _BySplit) -> bool:
    return not any(bool(outputs[split].losses.isnan().any()) for split in ("forget", "test"))


def _attack(outputs: _BySplit, score: MembershipScore) -> Measured:
    return measured_auroc(_unlikeness(outputs["forget"], score), _unlikeness(outputs["test"], score))


def _unlikeness(outputs: ModelOutputs, score: MembershipScore) -> Tensor:
    """Small for what looks like a member, as a loss is."""
    return outputs.losses if score == "loss" else -membership_score(outputs.logits, outputs.targets, score)


def _weights(comparison: Comparison) -> Iterator[Metric]:
    if not comparison.has_retrained:
        return
    retrained = comparison.models["retrained"]
    found = {role: Measured(float(verification_error(one, retrained))) for role, one in comparison.models.items()}
    others = [float(verification_error(module, retrained)) for module, _ in comparison.references]
    label = "Verification error" if comparison.paired else "Verification error (unpaired)"
    note = "Never evidence of forgetting by itself." if comparison.paired else "Unpaired: mostly the noise of training."
    distance = _distance("verification_error", label, None, "low", found, others)
    yield dataclasses.replace(distance, note=note)
