"""ToW, ToW-MIA and the average gap against the written-out products and means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_unlearn.functional.score_gaps import SplitScores, average_gap, tug_of_war, tug_of_war_membership

fractions = st.floats(0, 1)
scores = st.builds(SplitScores, fractions, fractions, fractions, fractions)


@given(scores, scores)
def test_equal_the_formulas(u, g):
    retain, test = abs(u.retain_accuracy - g.retain_accuracy), abs(u.test_accuracy - g.test_accuracy)
    forget, attack = abs(u.forget_accuracy - g.forget_accuracy), abs(u.membership - g.membership)
    assert tug_of_war(u, g) == pytest.approx((1 - forget) * (1 - retain) * (1 - test), abs=1e-15)
    assert tug_of_war_membership(u, g) == pytest.approx((1 - attack) * (1 - retain) * (1 - test), abs=1e-15)
    assert average_gap(u, g) == pytest.approx((forget + retain + test + attack) / 4, abs=1e-15)


@given(scores)
def test_the_retrained_model_itself_is_at_the_best_value(g):
    assert tug_of_war(g, g) == tug_of_war_membership(g, g) == 1
    assert average_gap(g, g) == 0


@given(scores, scores)
def test_symmetric_and_in_range(u, g):
    for function in (tug_of_war, tug_of_war_membership, average_gap):
        assert function(u, g) == function(g, u)
        assert 0 <= function(u, g) <= 1


def test_without_an_attack_the_mean_is_over_three():
    assert average_gap(SplitScores(1, 0.5, 0.5), SplitScores(0.4, 0.5, 0.5)) == pytest.approx(0.2)


def test_an_attack_on_one_model_only_is_refused():
    attacked, other = SplitScores(1, 1, 1, 0.5), SplitScores(1, 1, 1)
    for function in (average_gap, tug_of_war_membership):
        for pair in ((attacked, other), (other, attacked)):
            with pytest.raises(ValueError, match="one attack on both models"):
                function(*pair)
    with pytest.raises(ValueError, match="membership"):
        tug_of_war_membership(other, other)


@pytest.mark.parametrize("name", ["forget_accuracy", "retain_accuracy", "test_accuracy", "membership"])
@pytest.mark.parametrize("value", [94.3, -0.1, float("nan"), True])
def test_percentages_and_other_numbers_are_refused(name, value):
    good = dict.fromkeys(("forget_accuracy", "retain_accuracy", "test_accuracy", "membership"), 0.5)
    with pytest.raises(ValueError, match=name):
        SplitScores(**{**good, name: value})


def test_an_accuracy_cannot_be_left_open():
    with pytest.raises(ValueError, match="test_accuracy"):
        SplitScores(1, 1, None)
