"""The decision rule on cases whose answer is known."""

import dataclasses
import math

import pytest

from lightning_unlearn.procedures.verdict import DecisionRule, Estimate, Evidence, decide

# Grouped digits, one contributor of twenty wrong labels: the confidences that the study measured, roughly.
FORGOTTEN = Evidence(
    reference="retrained",
    samples=20,
    original=Estimate(0.80, 0.09),
    unlearned=Estimate(0.02, 0.03),
    moved=Estimate(0.78, 0.09),
    damage=Estimate(0.002, 0.005),
    placebo=Estimate(0.65, 0.10),
    advantage=Estimate(0.63, 0.10),
)


def case(**changes):
    return dataclasses.replace(FORGOTTEN, **changes)


CASES = {
    "memorised and forgotten": (FORGOTTEN, "forgotten", True),
    "memorised and untouched": (
        case(unlearned=Estimate(0.79, 0.09), moved=Estimate(0.01, 0.01), advantage=Estimate(-0.14, 0.05)),
        "not_forgotten",
        True,
    ),
    "moved a little": (
        case(unlearned=Estimate(0.65, 0.1), moved=Estimate(0.15, 0.03), advantage=Estimate(0.15, 0.03)),
        "not_forgotten",
        True,
    ),
    "half way": (
        case(unlearned=Estimate(0.40, 0.1), moved=Estimate(0.40, 0.1), advantage=Estimate(0.25, 0.06)),
        "partly_forgotten",
        True,
    ),
    "within the noise but well short": (
        case(unlearned=Estimate(0.30, 0.2), moved=Estimate(0.50, 0.1), advantage=Estimate(0.35, 0.1)),
        "partly_forgotten",
        True,
    ),
    "placebo forgets as well": (
        case(placebo=Estimate(0.04, 0.03), advantage=Estimate(0.02, 0.02)),
        "not_specific",
        True,
    ),
    "placebo difference within the noise": (
        case(placebo=Estimate(0.2, 0.1), advantage=Estimate(0.18, 0.1)),
        "not_specific",
        True,
    ),
    "certain but tiny advantage over the placebo": (
        case(placebo=Estimate(0.07, 0.01), advantage=Estimate(0.05, 0.001)),
        "not_specific",
        True,
    ),
    "placebo forgets even better": (
        case(placebo=Estimate(0.0, 0.01), advantage=Estimate(-0.02, 0.01)),
        "not_specific",
        True,
    ),
    "no placebo": (case(placebo=None, advantage=None), "unconfirmed", True),
    "nothing memorised": (
        case(original=Estimate(0.01, 0.02), unlearned=Estimate(0.01, 0.02), moved=Estimate(0.0, 0.01)),
        "nothing_to_forget",
        False,
    ),
    "memorised less than the noise between trainings": (
        case(original=Estimate(0.30, 0.2)),
        "nothing_to_forget",
        False,
    ),
    "certain but tiny difference": (case(original=Estimate(0.015, 0.0001)), "nothing_to_forget", False),
    "original below the reference": (case(original=Estimate(-0.4, 0.05)), "nothing_to_forget", False),
    "collapsed": (case(damage=Estimate(0.5, 0.02)), "damaged", True),
    "collapsed with nothing to forget": (
        case(original=Estimate(0.0, 0.02), damage=Estimate(0.5, 0.02)),
        "damaged",
        False,
    ),
    "damage within the noise": (case(damage=Estimate(0.06, 0.01)), "forgotten", True),
    "not finite": (case(unlearned=Estimate(math.nan, math.nan)), "damaged", True),
    "pushed past the reference": (
        case(unlearned=Estimate(-0.2, 0.05), moved=Estimate(1.0, 0.05), advantage=Estimate(0.8, 0.1)),
        "over_forgotten",
        True,
    ),
    "too few samples": (case(samples=4), "unknown", None),
    "no reference": (case(reference=None), "unknown", None),
}


@pytest.mark.parametrize("name", CASES)
def test_outcome(name):
    evidence, outcome, something = CASES[name]
    decision = decide(evidence)
    assert decision.outcome == outcome
    assert decision.something_to_forget is something
    assert decision.verdict.endswith(".")


def test_every_outcome_but_forgotten_lacks_the_claim():
    for evidence, outcome, _ in CASES.values():
        assert decide(evidence).verdict.startswith("Forgotten:") == (outcome == "forgotten")


def test_shares_removed():
    decision = decide(FORGOTTEN)
    assert decision.removed == pytest.approx(1 - 0.02 / 0.80)
    assert decision.removed_by_placebo == pytest.approx(1 - 0.65 / 0.80)
    assert decide(case(original=Estimate(0.01, 0.02))).removed is None
    assert decide(case(placebo=None, advantage=None)).removed_by_placebo is None


def test_words_for_a_pass_that_harmed_where_nothing_was_to_be_forgotten():
    harmed = case(original=Estimate(0.0, 0.02), unlearned=Estimate(-0.4, 0.05))
    assert "pushed it 40 ± 5 points below the retrained model" in decide(harmed).verdict
    broken = case(original=Estimate(0.0, 0.02), damage=Estimate(0.5, 0.02))
    assert "nothing measurable to forget in the first place" in decide(broken).verdict


def test_held_out_reference_is_named():
    assert "held-out samples" in decide(case(reference="held-out", placebo=None, advantage=None)).verdict


def test_thresholds_are_the_rules():
    strict = DecisionRule(errors=4.0)
    assert decide(case(original=Estimate(0.3, 0.1))).outcome != "nothing_to_forget"
    assert decide(case(original=Estimate(0.3, 0.1)), strict).outcome == "nothing_to_forget"
    assert decide(case(samples=4), DecisionRule(min_samples=1)).outcome == "forgotten"
    assert decide(case(damage=Estimate(0.3, 0.01)), DecisionRule(damage=0.5)).outcome == "forgotten"


def test_more_placebo_never_helps_the_claim():
    order = [decide(case(advantage=Estimate(0.7 - 0.05 * step, 0.05))).outcome for step in range(15)]
    assert order[0] == "forgotten"
    assert order[-1] == "not_specific"
    assert order == sorted(order)
