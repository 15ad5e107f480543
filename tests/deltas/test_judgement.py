import pytest

from lightning_unlearn.deltas.judgement import (
    PlanThresholds,
    judge_damage,
    judge_placement,
    judge_specificity,
    recommend,
)

DEFAULT = PlanThresholds()


@pytest.mark.parametrize(
    ("norm", "plain", "want"),
    [
        (0.0, False, "fine"), (0.02, False, "fine"), (0.021, False, "note"), (0.03, False, "note"),
        (0.031, False, "warn"), (0.06, False, "warn"), (0.061, False, "strong"), (0.2, False, "strong"),
        (0.21, False, "refuse"), (float("inf"), False, "refuse"), (float("nan"), False, "refuse"),
        (0.0, True, "fine"), (0.001, True, "warn"), (0.15, True, "strong"), (0.3, True, "refuse"),
    ],
)  # fmt: skip
def test_damage(norm, plain, want):
    assert judge_damage(norm, plain, DEFAULT) == want


@pytest.mark.parametrize(("share", "want"), [(0.1, "grouped"), (0.099, "scattered"), (1.0, "grouped")])
def test_placement(share, want):
    assert judge_placement(share, DEFAULT) == want


@pytest.mark.parametrize(
    ("placement", "touched", "want"),
    [
        ("grouped", 0.9, "specific"), ("scattered", 0.0, "specific"), ("scattered", 0.01, "note"),
        ("scattered", 0.011, "warn"), ("scattered", 0.2, "warn"), ("scattered", 0.21, "refuse"),
    ],
)  # fmt: skip
def test_specificity(placement, touched, want):
    assert judge_specificity(placement, touched, DEFAULT) == want


def test_other_thresholds():
    mild = PlanThresholds(damage=(0.5, 0.6, 0.7, 0.8), touched=(0.5, 0.6), grouped_share=0.1)
    assert judge_damage(0.3, False, mild) == "fine"
    assert judge_specificity("scattered", 0.55, mild) == "warn"
    assert judge_placement(0.1, mild) == "grouped"


FACTS = {
    "samples": 20, "steps": 20, "all_steps": 460, "relative_norm": 0.03, "mean_share": 0.31, "damage": "note",
    "specificity": "specific", "plain_sgd": False, "missing": 0, "lost": 0, "outside": 0,
    "retraining_seconds": 90.0,
}  # fmt: skip


def test_the_paragraph_says_what_it_knows():
    text = recommend(**FACTS)
    for part in ("20 ids", "20 of 460 steps", "4.3%", "3.0%", "31%", "about 1 point"):
        assert part in text
    for part in ("Refused", "scattered", "without momentum", "no stored delta", "other than an optimizer"):
        assert part not in text


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"damage": "refuse"}, ["because of the damage:", "Retrain", "90 s", "force=True"]),
        ({"specificity": "refuse"}, ["because of the lack of specificity:", "scattered", "SubjectGrouping"]),
        ({"damage": "refuse", "specificity": "refuse"}, ["the damage and the lack of specificity"]),
        ({"plain_sgd": True}, ["SGD without momentum"]),
        ({"missing": 3}, ["3 of the steps have no stored delta"]),
        ({"lost": 2}, ["2 damaged steps"]),
        ({"outside": 1}, ["changed these weights 1 time in 460 steps", "does not undo"]),
        ({"outside": 7}, ["changed these weights 7 times in 460 steps"]),
        ({"damage": "warn"}, ["then=FineTune(max_steps=50)"]),
        ({"steps": 0}, ["nothing to subtract"]),
    ],
)
def test_the_paragraph_names_what_speaks_against_it(change, parts):
    text = recommend(**{**FACTS, **change})
    assert all(part in text for part in parts)
