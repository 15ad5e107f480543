import pytest

from lightning_unlearn.tuning.objective import ErrorRates, Objective

RATES = ErrorRates(forget=0.1, validation=0.3, original_validation=0.25)


@pytest.mark.parametrize(
    ("goal", "utility", "lambda_", "value"),
    [
        ("privacy", "absolute", 0.25, 0.25 * 0.2 + 0.75 * 0.3),
        ("privacy", "relative", 0.25, 0.25 * 0.2 + 0.75 * 0.05),
        ("bias_removal", "absolute", 0.25, 0.25 * 0.9 + 0.75 * 0.3),
        ("privacy", "absolute", 1.0, 0.2),
        ("bias_removal", "absolute", 0.0, 0.3),
    ],
)
def test_the_value_weighs_goal_and_utility(goal, utility, lambda_, value):
    assert Objective(goal, lambda_, utility).value(RATES) == pytest.approx(value, abs=1e-15)


def test_privacy_is_missed_on_either_side():
    objective = Objective("privacy", 1.0)
    assert objective.goal_error(ErrorRates(0.2, 0.3, 0)) == pytest.approx(objective.goal_error(ErrorRates(0.4, 0.3, 0)))


def test_a_larger_lambda_prefers_the_goal():
    forgetting, useful = ErrorRates(1.0, 0.5, 0.1), ErrorRates(0.2, 0.1, 0.1)
    for lambda_, better in ((0.2, useful), (0.8, forgetting)):
        objective = Objective("bias_removal", lambda_)
        assert min((forgetting, useful), key=objective.value) is better


@pytest.mark.parametrize("arguments", [("utility",), ("privacy", 1.1), ("privacy", -0.1), ("privacy", 0.5, "both")])
def test_what_is_no_objective_is_refused(arguments):
    with pytest.raises(ValueError, match="Expected `"):
        Objective(*arguments)
