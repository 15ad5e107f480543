"""The decision rule: what the evidence allows to be said about a forgetting pass, as a pure function.

The measure is the *confidence*: the probability a model gives to the labels of the forget set, averaged. What the
original has more of it than a model that never saw the samples is what it memorised (in the sense of Feldman and Zhang
2020, arXiv 2008.03703). Differences count only where they exceed `DecisionRule.errors` standard errors. Distance
between weights plays no part here. The rule is heuristic: its thresholds come from small measured studies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_unlearn.results import Outcome

__all__ = ["Decision", "DecisionRule", "Estimate", "Evidence", "Reference", "decide"]

Reference: TypeAlias = Literal["retrained", "held-out"]

_NAMES: dict[Reference, str] = {"retrained": "the retrained model", "held-out": "held-out samples"}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error.

    >>> Estimate(0.3, 0.1).exceeds(0.05, errors=2), Estimate(0.3, 0.2).exceeds(0.05, errors=2)
    (True, False)
    """

    value: float
    error: float = 0.0

    def exceeds(self, threshold: float, *, errors: float) -> bool:
        """Whether the value is above the threshold by so many standard errors."""
        return self.value - errors * self.error > threshold

    def __neg__(self) -> Estimate:
        """The same estimate with the opposite sign."""
        return Estimate(-self.value, self.error)

    def __str__(self) -> str:
        """In points of percent, as `12 ± 3 points`."""
        return f"{100 * self.value:.0f} ± {100 * self.error:.0f} points"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the rule looks at. All estimates are differences of probabilities or of accuracies, in [-1, 1].

    Attributes:
        reference: What stands for a model that never saw the samples; `None` where nothing does.
        samples: Number of forgotten samples.
        original: Confidence on the forget set, original minus reference.
        unlearned: Unlearned minus reference.
        moved: Original minus unlearned.
        placebo: Placebo minus reference, or `None` without a placebo.
        advantage: Placebo minus unlearned, or `None`.
        damage: Test accuracy of the original (of the retrained model, where that is lower) minus the unlearned model's.
    """

    reference: Reference | None
    samples: int
    original: Estimate
    unlearned: Estimate
    moved: Estimate
    damage: Estimate
    placebo: Estimate | None = None
    advantage: Estimate | None = None


@dataclass(frozen=True, slots=True)
class DecisionRule:
    """Thresholds, heuristic throughout.

    Attributes:
        errors: Standard errors a difference must exceed.
        least_effect: Smallest difference in confidence that counts as anything.
        moved: Share of the memorisation that must be gone for "partly forgotten".
        reached: Share that must be gone for "forgotten"; the rest must be within the noise as well.
        placebo_margin: How much more of it than by the placebo must be gone. As much as counts as having moved at
            all: an advantage smaller than that is no forgetting of its own.
        damage: Loss of test accuracy that makes the result worthless.
        min_samples: Fewest forgotten samples that anything is concluded from.
    """

    errors: float = 2.0
    least_effect: float = 0.02
    moved: float = 0.25
    reached: float = 0.8
    placebo_margin: float = 0.25
    damage: float = 0.05
    min_samples: int = 5


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows; see the fields of the same name in :class:`lightning_unlearn.results.EvaluationResult`."""

    outcome: Outcome
    something_to_forget: bool | None
    verdict: str
    removed: float | None = None
    removed_by_placebo: float | None = None


def _removed(left: Estimate | None, original: Estimate) -> float | None:
    return None if left is None else 1.0 - left.value / original.value


def decide(evidence: Evidence, rule: DecisionRule | None = None) -> Decision:
    """Say what the evidence allows.

    In this order: nothing is concluded without a reference or from too few samples; a damaged model shows nothing; an
    original that is within the noise of the reference had nothing measurable to forget; a model pushed past the
    reference over-forgot; one that hardly moved did not forget; what a placebo does as well is not specific; the rest
    is "forgotten" at the reference, "partly forgotten" short of it, and "unconfirmed" there without a placebo.

    >>> decide(Evidence("retrained", 20, Estimate(0.8, 0.09), Estimate(0.02, 0.03), Estimate(0.78, 0.09),
    ...     Estimate(0.0, 0.01), placebo=Estimate(0.65, 0.1), advantage=Estimate(0.63, 0.1))).outcome
    'forgotten'
    """
    limits = rule or DecisionRule()
    known = evidence.reference is not None and evidence.samples >= limits.min_samples
    something = evidence.original.exceeds(limits.least_effect, errors=limits.errors) if known else None
    removed = placebo = None
    if something:
        removed, placebo = (
            _removed(evidence.unlearned, evidence.original),
            _removed(evidence.placebo, evidence.original),
        )
    outcome, text = _judge(evidence, limits, something, removed)
    return Decision(outcome, something, text, removed, placebo)


def _judge(
    evidence: Evidence, limits: DecisionRule, something: bool | None, removed: float | None
) -> tuple[Outcome, str]:
    if not math.isfinite(evidence.unlearned.value) or evidence.damage.exceeds(limits.damage, errors=limits.errors):
        return "damaged", _damage_text(evidence, something)
    if evidence.reference is None:
        return "unknown", "Nothing stands for a model that never saw the samples, so nothing can be concluded."
    name = _NAMES[evidence.reference]
    if something is None:
        return "unknown", (
            f"{evidence.samples} forgotten samples are too few to conclude anything (at least {limits.min_samples})."
        )
    overshot = (-evidence.unlearned).exceeds(limits.least_effect, errors=limits.errors)
    away = f" The pass pushed it {-evidence.unlearned} below {name}." if overshot else ""
    if not something:
        return "nothing_to_forget", (
            f"No measurable memorisation: on the forget set the original's confidence differs from that of {name} by "
            f"{evidence.original}, which is within the noise, so there was nothing that forgetting could show.{away}"
        )
    share = 0.0 if removed is None else removed
    gone = f"{100 * share:.0f} % of the memorisation ({evidence.original}) is gone"
    if overshot:
        return "over_forgotten", f"Over-forgotten: the unlearned model is {-evidence.unlearned} below {name}."
    if not evidence.moved.exceeds(limits.least_effect, errors=limits.errors) or share < limits.moved:
        return "not_forgotten", f"Not forgotten: only {gone}."
    if evidence.advantage is not None and not _specific(evidence, limits):
        return "not_specific", (
            f"Not specific: {gone}, but removing an innocent group in the same way did about as much "
            f"(difference {evidence.advantage}). This is general damage or re-learning, not forgetting."
        )
    within = not evidence.unlearned.exceeds(limits.least_effect, errors=limits.errors)
    if not within or share < limits.reached:
        return "partly_forgotten", f"Partly forgotten: {gone}; {evidence.unlearned} above {name} remain."
    if evidence.advantage is None:
        return "unconfirmed", (
            f"At the level of {name}: {gone}. Without a placebo it is not known whether that is specific."
        )
    return "forgotten", f"Forgotten: {gone}, {evidence.advantage} more than removing an innocent group did."


def _specific(evidence: Evidence, limits: DecisionRule) -> bool:
    if evidence.advantage is None:
        return False
    margin = limits.placebo_margin * evidence.original.value
    return evidence.advantage.value >= margin and evidence.advantage.exceeds(0.0, errors=limits.errors)


def _damage_text(evidence: Evidence, something: bool | None) -> str:
    if not math.isfinite(evidence.unlearned.value):
        return "Damaged: the unlearned model's outputs are not finite."
    idle = " There was nothing measurable to forget in the first place." if something is False else ""
    return (
        f"Damaged: test accuracy fell by {evidence.damage}. A model that answers worse everywhere answers worse on the "
        f"forget set as well, so its forget metrics show nothing.{idle}"
    )
