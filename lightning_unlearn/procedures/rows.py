"""The rows of an evaluation: every metric for every model, with the value it should have and what that means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning import LightningModule
from torch import Tensor

from lightning_unlearn.functional.divergences import kl_to_reference
from lightning_unlearn.functional.membership import membership_auroc, membership_auroc_error
from lightning_unlearn.functional.weight_distance import verification_error
from lightning_unlearn.procedures.evidence import mean_estimate, share_estimate
from lightning_unlearn.procedures.outputs import ModelOutputs
from lightning_unlearn.procedures.verdict import Estimate
from lightning_unlearn.results import MetricValue, ModelRole, Target
from lightning_unlearn.types import Split

__all__ = ["Comparison", "metric_rows"]

ROLES: tuple[ModelRole, ...] = ("original", "unlearned", "retrained", "placebo")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the rows are computed from.

    Attributes:
        models: Role -> module.
        outputs: Role -> split -> outputs.
        references: Further retrained models: a module and its outputs by split, for each.
        true_outputs: Role -> outputs on the forget set scored against the true labels, empty if they are not known.
        altered: Whether any label of the forget set is known to be wrong.
        paired: Whether the retrained model shares initial weights and order of data with the original.
        min_members: Fewest members and non-members that a membership attack is run with.
    """

    models: Mapping[ModelRole, LightningModule]
    outputs: Mapping[ModelRole, Mapping[Split, ModelOutputs]]
    references: Sequence[tuple[LightningModule, Mapping[Split, ModelOutputs]]]
    true_outputs: Mapping[ModelRole, ModelOutputs]
    altered: bool
    paired: bool
    min_members: int = 10


Measure = Callable[[ModelRole], tuple[float, float | None]]


def metric_rows(comparison: Comparison) -> tuple[MetricValue, ...]:
    """Measure everything that can be measured; a metric whose requirements are not met has no row."""
    return (
        *_scores(comparison),
        *_true_label_accuracy(comparison),
        *_divergences(comparison),
        *_membership(comparison),
        *_weights(comparison),
    )


def _rows(
    comparison: Comparison,
    name: str,
    label: str,
    split: Split | None,
    target: Target,
    measure: Measure,
    reference: Callable[[ModelRole], float | None],
    note: str = "",
) -> list[MetricValue]:
    rows = []
    for role in ROLES:
        if role in comparison.models:
            value, spread = measure(role)
            right = reference(role)
            gap = None if right is None else value - right
            words = _words(role, value, right, gap, spread, target) + (f" {note}" if note else "")
            rows.append(MetricValue(name, label, role, split, value, right, gap, target, spread, words))
    return rows


def _words(
    role: ModelRole, value: float, right: float | None, gap: float | None, spread: float | None, target: Target
) -> str:
    if role == "retrained":
        return "The reference."
    if right is None or gap is None:
        return "No retrained reference."
    if not math.isfinite(value):
        return "Not finite."
    if target == "low":
        return f"{value:.3g} where {right:.3g} is right."
    noise = "" if spread is None else f" (standard error {spread:.2g})"
    if gap == 0 or (spread is not None and abs(gap) <= 2 * spread):
        return f"Within two standard errors of {right:.3g}{noise}." if spread else f"Equal to {right:.3g}."
    return f"{abs(gap):.3g} {'above' if gap > 0 else 'below'} {right:.3g}{noise}."


def _pair(estimate: Estimate) -> tuple[float, float | None]:
    return estimate.value, estimate.error


def _scores(comparison: Comparison) -> list[MetricValue]:
    """Accuracy on every split, loss and confidence on the forget set."""

    def accuracy(outputs: ModelOutputs) -> Estimate:
        return share_estimate(outputs.correct)

    def loss(outputs: ModelOutputs) -> Estimate:
        return mean_estimate(outputs.losses)

    def confidence(outputs: ModelOutputs) -> Estimate:
        return mean_estimate(outputs.confidences)

    table: list[tuple[str, str, Split, Callable[[ModelOutputs], Estimate]]] = [
        ("forget_accuracy", "Accuracy on the forget set", "forget", accuracy),
        ("retain_accuracy", "Accuracy on the retain set", "retain", accuracy),
        ("test_accuracy", "Accuracy on held-out data", "test", accuracy),
        ("forget_loss", "Loss on the forget set (nats)", "forget", loss),
        ("forget_confidence", "Confidence in the forget labels", "forget", confidence),
    ]
    rows: list[MetricValue] = []
    for name, label, split, score in table:
        if split not in comparison.outputs["original"]:
            continue

        def measure(
            role: ModelRole, split: Split = split, score: Callable[[ModelOutputs], Estimate] = score
        ) -> tuple[float, float | None]:
            return _pair(score(comparison.outputs[role][split]))

        def reference(
            role: ModelRole, split: Split = split, score: Callable[[ModelOutputs], Estimate] = score
        ) -> float | None:
            if "retrained" in comparison.models:
                return score(comparison.outputs["retrained"][split]).value
            if split == "forget" and not comparison.altered:
                return score(comparison.outputs[role]["test"]).value
            return None

        held_out = "retrained" not in comparison.models and split == "forget" and not comparison.altered
        note = "The reference is the model's own value on held-out data." if held_out else ""
        rows += _rows(comparison, name, label, split, "retrained", measure, reference, note)
    return rows


def _true_label_accuracy(comparison: Comparison) -> list[MetricValue]:
    true = comparison.true_outputs
    if not true:
        return []

    def measure(role: ModelRole) -> tuple[float, float | None]:
        return _pair(share_estimate(true[role].correct))

    right = measure("retrained")[0] if "retrained" in comparison.models else None
    label = "Accuracy on the forget set, true labels"
    return _rows(comparison, "true_label_accuracy", label, "forget", "retrained", measure, lambda _: right)


def _divergences(comparison: Comparison) -> list[MetricValue]:
    if "retrained" not in comparison.models:
        return []
    rows: list[MetricValue] = []
    splits: tuple[tuple[Split, str], ...] = (("forget", "the forget set"), ("test", "held-out data"))
    for split, words in splits:
        retrained = comparison.outputs["retrained"][split].logits
        others = [
            mean_estimate(kl_to_reference(item[split].logits, retrained)).value for _, item in comparison.references
        ]
        floor = sum(others) / len(others) if others else 0.0
        note = "The right value is that of another retraining." if others else ""

        def measure(role: ModelRole, split: Split = split, retrained: Tensor = retrained) -> tuple[float, float | None]:
            return _pair(mean_estimate(kl_to_reference(comparison.outputs[role][split].logits, retrained)))

        def reference(_: ModelRole, floor: float = floor) -> float:
            return floor

        label = f"KL(retrained || model) on {words} (nats)"
        rows += _rows(comparison, f"{split}_kl", label, split, "low", measure, reference, note)
    return rows


def _membership(comparison: Comparison) -> list[MetricValue]:
    losses = {role: (item["forget"].losses, item["test"].losses) for role, item in comparison.outputs.items()}
    few = min(part.numel() for part in losses["original"]) < comparison.min_members
    if few or any(bool(part.isnan().any()) for pair in losses.values() for part in pair):
        return []

    def measure(role: ModelRole) -> tuple[float, float | None]:
        members, nonmembers = losses[role]
        value = float(membership_auroc(members, nonmembers))
        return value, membership_auroc_error(value, members.numel(), nonmembers.numel())

    retrained = "retrained" in comparison.models
    # Held-out samples of the same distribution cannot be told apart; wrong labels can, whatever the model has seen.
    right = measure("retrained")[0] if retrained else (None if comparison.altered else 0.5)
    label = "Membership attack, forget against held-out (AUROC)"
    return _rows(comparison, "membership_auroc", label, None, "retrained", measure, lambda _: right)


def _weights(comparison: Comparison) -> list[MetricValue]:
    if "retrained" not in comparison.models:
        return []
    retrained = comparison.models["retrained"]
    others = [float(verification_error(module, retrained)) for module, _ in comparison.references]

    def measure(role: ModelRole) -> tuple[float, float | None]:
        return float(verification_error(comparison.models[role], retrained)), None

    floor = sum(others) / len(others) if others else 0.0
    label = "Verification error" if comparison.paired else "Verification error (unpaired)"
    note = "Never evidence of forgetting by itself." if comparison.paired else "Unpaired: mostly the noise of training."
    return _rows(comparison, "verification_error", label, None, "low", measure, lambda _: floor, note)
