"""What a planned subtraction is likely to do: pure functions from the plan's numbers to words and advice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = [
    "Damage",
    "Placement",
    "PlanThresholds",
    "Specificity",
    "judge_damage",
    "judge_placement",
    "judge_specificity",
    "recommend",
]

Damage: TypeAlias = Literal["fine", "note", "warn", "strong", "refuse"]
"""How much accuracy the subtraction is likely to cost before any repair."""

Specificity: TypeAlias = Literal["specific", "note", "warn", "refuse"]
"""Whether the subtraction removes the asked samples, or whatever shared their steps."""

Placement: TypeAlias = Literal["grouped", "scattered"]
"""Whether the samples shared their batches mostly with each other."""

_EXPECTED: dict[Damage, str] = {
    "fine": "Subtraction should cost little accuracy: half a point on average in the measured cases, 3 at worst.",
    "note": "Expect about 1 point of accuracy lost, up to 4, before a repair.",
    "warn": "Expect about 3 points of accuracy lost, up to 8, before a repair: chain `then=FineTune(max_steps=50)`.",
    "strong": "Expect about 9 points of accuracy lost, up to 19: without a repair the model is hardly usable.",
    "refuse": "That is destructive: 10 to 75 points in the measured cases.",
}


@dataclass(frozen=True, slots=True)
class PlanThresholds:
    """Where a plan begins to warn, and where it refuses. Heuristic.

    Evidence: `docs/forgetting-study.md`, a CNN of 106 thousand parameters trained from scratch on 10,000 images of
    Fashion-MNIST, SGD with momentum and AdamW, 3 seeds, 1 to 100 samples. Mean and worst change of test accuracy before
    repair, by relative norm: up to 0.02 -0.6 / -3 points, up to 0.03 -0.9 / -3, up to 0.06 -3 / -8, up to 0.2 -9 / -15,
    above -35 / -74. An earlier, smaller study on other networks saw -1 / -4 up to 0.05, -5 / -19 up to 0.2, and no safe
    size under SGD without momentum. Own steps moved a memorised set clearly more than an innocent one's steps
    where the set made up 16 % and more of its batches, and no more than those at 1.6 %. Larger models and fine-tuning
    from a public model were not measured: trust the probe before any threshold.

    Attributes:
        damage: Relative norms up to which the damage is `"fine"`, `"note"`, `"warn"` and `"strong"`.
        touched: Touched fractions up to which scattered samples give a `"note"` and a `"warn"`.
        grouped_share: Mean share of the touched batches from which samples count as grouped.
    """

    damage: tuple[float, float, float, float] = (0.02, 0.03, 0.06, 0.2)
    touched: tuple[float, float] = (0.01, 0.2)
    grouped_share: float = 0.1


def judge_damage(relative_norm: float, plain_sgd: bool, thresholds: PlanThresholds) -> Damage:
    """Damage from the change's norm relative to the whole training's travel.

    >>> judge_damage(0.07, False, PlanThresholds()), judge_damage(0.001, True, PlanThresholds())
    ('strong', 'warn')
    """
    levels: tuple[Damage, ...] = ("fine", "note", "warn", "strong", "refuse")
    level = sum(not relative_norm <= bound for bound in thresholds.damage)
    return levels[max(level, 2 if plain_sgd and relative_norm > 0 else 0)]


def judge_placement(mean_share: float, thresholds: PlanThresholds) -> Placement:
    """Placement from the mean share of the asked samples in the touched batches.

    >>> judge_placement(20 / 64, PlanThresholds()), judge_placement(1 / 64, PlanThresholds())
    ('grouped', 'scattered')
    """
    return "grouped" if mean_share >= thresholds.grouped_share else "scattered"


def judge_specificity(placement: Placement, touched_fraction: float, thresholds: PlanThresholds) -> Specificity:
    """Specificity from placement and touched fraction.

    >>> judge_specificity("scattered", 0.05, PlanThresholds()), judge_specificity("grouped", 0.5, PlanThresholds())
    ('warn', 'specific')
    """
    if placement == "grouped" or touched_fraction == 0:
        return "specific"
    levels: tuple[Specificity, ...] = ("note", "warn", "refuse")
    return levels[sum(touched_fraction > bound for bound in thresholds.touched)]


def recommend(
    *,
    samples: int,
    steps: int,
    all_steps: int,
    relative_norm: float,
    mean_share: float,
    damage: Damage,
    specificity: Specificity,
    plain_sgd: bool,
    missing: int,
    lost: int,
    outside: int,
    retraining_seconds: float,
) -> str:
    """One paragraph in plain words: what will happen, what speaks against it, what to do instead."""
    if not steps:
        return "No step that is still in these weights saw the samples: there is nothing to subtract."
    size = (
        f"The {samples} id{'s' * (samples != 1)} asked for took part in {steps} of {all_steps} steps "
        f"({steps / all_steps:.1%}); subtracting them moves the weights by {relative_norm:.1%} of the distance that "
        f"training covered."
    )
    text = [size, _EXPECTED[damage]]
    if specificity == "specific":
        text.append(
            f"On average they make up {mean_share:.0%} of the touched batches, so the change is largely their own; "
            "what remains approximate is what later steps and momentum built on it."
        )
    else:
        text.append(
            f"They are scattered ({mean_share:.1%} of the touched batches): most of what is subtracted was learnt from "
            "others, and subtracting somebody else's steps would forget them about as well. Train with "
            "`SubjectGrouping` where deletion requests are to be expected."
        )
    if plain_sgd:
        text.append("The run used SGD without momentum, for which no size of subtraction was found safe.")
    if missing:
        text.append(f"{missing} of the steps have no stored delta, so the subtraction cannot be carried out.")
    if lost:
        text.append(f"{lost} damaged steps of this training lost their ids: whether they saw the samples is unknown.")
    if outside:
        text.append(
            "Something other than an optimizer (weight averaging, clamping, an edit in a hook) changed these weights "
            f"{outside} time{'s' * (outside != 1)} in {all_steps} steps: subtraction does not undo what the samples "
            "left in those edits."
        )
    if damage == "refuse" or specificity == "refuse":
        reasons = [
            *(["the damage"] if damage == "refuse" else []),
            *(["the lack of specificity"] if specificity == "refuse" else []),
        ]
        text.append(
            f"Refused because of {' and '.join(reasons)}: retrain without the samples "
            f"(`Retrain`, about {retraining_seconds:,.0f} s as recorded), or fine-tune on the rest (`FineTune`), which "
            "removes less; `force=True` subtracts nevertheless."
        )
    return " ".join(text)
