"""What the demo's numbers say, in plain words; every sentence is chosen and filled by the numbers."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from lightning_unlearn.demo.arm import ARMS, ArmResult, Placement

__all__ = ["METRICS", "arms_of", "mean", "outcomes", "story", "summary", "values"]

METRICS: dict[str, tuple[str, float, int]] = {
    "forget_accuracy": ("forget %", 100, 0),
    "true_label_accuracy": ("true label %", 100, 0),
    "retain_accuracy": ("retain %", 100, 1),
    "test_accuracy": ("test %", 100, 1),
    "forget_kl": ("KL forget", 1, 2),
    "test_kl": ("KL test", 1, 3),
    "membership_auroc": ("AUROC", 1, 2),
    "verification_error": ("verif. error", 1, 2),
    "seconds": ("seconds", 1, 1),
}
"""Metric -> column header, factor for display, decimals."""


def arms_of(results: Sequence[ArmResult], placement: Placement) -> list[ArmResult]:
    """The arms with one placement, by seed."""
    return sorted((arm for arm in results if arm.placement == placement), key=lambda arm: arm.seed)


def values(
    results: Sequence[ArmResult], placement: Placement, contributor: str, label: str, metric: str
) -> list[float]:
    """One number per seed."""
    return [
        row.values[metric]
        for arm in arms_of(results, placement)
        for row in arm.rows
        if row.contributor == contributor and row.label == label
    ]


def mean(results: Sequence[ArmResult], placement: Placement, contributor: str, label: str, metric: str) -> float:
    """Mean over seeds."""
    return statistics.mean(values(results, placement, contributor, label, metric))


def outcomes(results: Sequence[ArmResult], placement: Placement, contributor: str, label: str) -> str:
    """What the evaluation says of a method, seed by seed, such as `forgotten (3 of 3)`."""
    counts = Counter(arm.verdicts[contributor][label].outcome for arm in arms_of(results, placement))
    total = sum(counts.values())
    return ", ".join(f"{name.replace('_', ' ')} ({count} of {total})" for name, count in counts.most_common())


def summary(results: Sequence[ArmResult]) -> str:
    """One paragraph that may be read alone."""

    def number(placement: Placement, label: str, metric: str) -> float:
        return 100 * mean(results, placement, "mislabelled", label, metric)

    parts = []
    for placement in ARMS:
        how = "sharing their batches" if placement == "grouped" else "shuffled among all others"
        own = number(placement, "amnesiac + repair", "forget_accuracy")
        bystander = number(placement, "placebo: amnesiac + repair", "forget_accuracy")
        original, twin = (number(placement, label, "forget_accuracy") for label in ("original", "retrained twin"))
        verdict = ", so it was their own steps that counted." if own + 5 < bystander else ": forgetting by damage."
        parts.append(
            f"With a contributor's images {how}, amnesiac unlearning and a short repair took the wrong labels the "
            f"model had learnt from {original:.0f} % to {own:.0f} % (retrained: {twin:.0f} %), at "
            f"{_points(results, placement)} of test accuracy; doing the same with an innocent bystander's steps left "
            f"{bystander:.0f} %{verdict}"
        )
    nothing = [arm.verdicts["clean"]["amnesiac + repair"].something_to_forget is False for arm in results]
    parts.append(
        f"The contributor with right labels had nothing measurable to forget in {sum(nothing)} of {len(nothing)} runs."
    )
    return " ".join(parts)


def _points(results: Sequence[ArmResult], placement: Placement) -> str:
    before, after = (
        100 * mean(results, placement, "mislabelled", label, "test_accuracy")
        for label in ("original", "amnesiac + repair")
    )
    change = after - before
    return f"{abs(change):.1f} points {'less' if change < 0 else 'more'}"


def story(results: Sequence[ArmResult]) -> list[str]:
    """One paragraph per question a reader has."""

    def number(placement: Placement, contributor: str, label: str, metric: str) -> float:
        _, factor, _ = METRICS[metric]
        return factor * mean(results, placement, contributor, label, metric)

    return [
        _memorised(number),
        _placed(results, number, "grouped"),
        _placed(results, number, "random"),
        _clean(results, number),
    ]


Number = Callable[[Placement, str, str, str], float]


def _memorised(number: Number) -> str:
    original, twin = (
        number("grouped", "mislabelled", label, "forget_accuracy") for label in ("original", "retrained twin")
    )
    text = (
        f"The model gives {original:.0f} % of the mislabelled contributor's 20 images the wrong label they came with; "
        f"a model retrained without them does so for {twin:.0f} %."
    )
    if original > twin + 10:
        return f"{text} It memorised them: that is what there is to forget."
    return f"{text} It hardly memorised them, so there is little to forget."


def _placed(results: Sequence[ArmResult], number: Number, placement: Placement) -> str:
    def forget(label: str) -> float:
        return number(placement, "mislabelled", label, "forget_accuracy")

    arms = arms_of(results, placement)
    touched = 100 * statistics.mean(arm.plans["mislabelled"]["touched_fraction"] for arm in arms)
    test_before, test_after = (
        number(placement, "mislabelled", label, "test_accuracy") for label in ("original", "amnesiac")
    )
    own, only = forget("amnesiac + repair"), forget("fine-tune only")
    placebo = forget("placebo: amnesiac + repair")
    how = "shared their batches" if placement == "grouped" else "were shuffled like everybody's"
    text = (
        f"Where the contributor's images {how}, forgetting touched {touched:.0f} % of the training steps. Subtracting "
        f"them took test accuracy from {test_before:.1f} % to {test_after:.1f} % before repair. After 50 repair steps "
        f"{own:.0f} % of the wrong labels were left; repair without subtraction left {only:.0f} %, and subtracting an "
        f"innocent bystander's steps instead left {placebo:.0f} %. "
    )
    if own + 5 < min(placebo, only):
        text += "So the contributor's own steps did the forgetting."
    elif own + 5 < only:
        text += "So the subtraction is not specific: damage and re-learning forget as well with anybody's steps."
    else:
        text += "So subtraction added nothing that repair alone does not do."
    verdict = outcomes(results, placement, "mislabelled", "amnesiac + repair")
    return f"{text} The evaluation's verdict on amnesiac with repair: {verdict}."


def _clean(results: Sequence[ArmResult], number: Number) -> str:
    original, twin = (number("grouped", "clean", label, "forget_accuracy") for label in ("original", "retrained twin"))
    arms = [*arms_of(results, "grouped"), *arms_of(results, "random")]
    found = [arm.verdicts["clean"]["amnesiac + repair"].something_to_forget for arm in arms]
    nothing = sum(answer is False for answer in found)
    text = (
        f"Of the clean contributor's images {original:.0f} % get their label from the model and {twin:.0f} % from one "
        f"retrained without them: in {nothing} of {len(found)} runs there was nothing measurable to forget. "
    )
    start, random = (number("random", "clean", label, "forget_kl") for label in ("original", "amnesiac"))
    grouped = number("grouped", "clean", "amnesiac", "forget_kl")
    return text + (
        f"With random placement, amnesiac alone took the answers on those images from {start:.2f} to {random:.2f} nats "
        f"away from the retrained model's ({grouped:.2f} with grouped placement): where nothing was memorised, a pass "
        f"{'can only lose' if random > start else 'gains little'}."
    )
