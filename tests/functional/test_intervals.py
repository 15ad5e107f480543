"""Intervals against SciPy, and how often they hold the truth."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_unlearn.functional.intervals import paired_bootstrap, student_interval


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("runs", [2, 5, 30])
def test_student_equals_scipy(runs, confidence):
    values = torch.randn(runs) * 3 + 1
    found = student_interval(values, confidence=confidence)
    numbers = values.double().numpy()
    low, high = stats.t.interval(confidence, runs - 1, numbers.mean(), stats.sem(numbers))
    assert (found.mean, found.low, found.high) == pytest.approx((numbers.mean(), low, high), rel=1e-9)
    assert found.confidence == confidence


def test_student_holds_the_truth_as_often_as_it_says():
    """Of 2000 intervals at 80 %, whose share has a standard error of 0.009."""
    held = sum(
        one.low <= 2 <= one.high for one in (student_interval(v, confidence=0.8) for v in torch.randn(2000, 4) + 2)
    )
    assert held / 2000 == pytest.approx(0.8, abs=0.035)


def test_bootstrap_agrees_with_scipy_and_cancels_what_is_shared():
    base = torch.randn(40) * 10
    first, second = base + 0.5 + 0.1 * torch.randn(40), base
    found = paired_bootstrap(first, second, resamples=20_000)
    difference = (first.double() - second.double()).numpy()
    other = stats.bootstrap(
        (difference,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    )
    assert found.mean == pytest.approx(difference.mean())
    assert (found.low, found.high) == pytest.approx(tuple(other.confidence_interval), abs=0.003)
    assert 0.02 < found.high - found.low < 0.12


def test_bootstrap_is_repeatable_and_leaves_the_random_state_alone():
    first, second = torch.randn(12), torch.randn(12)
    before = torch.get_rng_state()
    one = paired_bootstrap(first, second, resamples=500)
    assert one == paired_bootstrap(first, second, resamples=500)
    assert one != paired_bootstrap(first, second, resamples=500, seed=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "values", [torch.ones(1), torch.ones(2, 2), torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf])]
)
def test_refuses_what_has_no_interval(values):
    with pytest.raises(ValueError, match="at least two finite"):
        student_interval(values)
    with pytest.raises(ValueError, match="`second`"):
        paired_bootstrap(torch.ones(2), values)


def test_refuses_wrong_arguments():
    with pytest.raises(ValueError, match="confidence"):
        student_interval(torch.ones(3), confidence=95)
    with pytest.raises(ValueError, match="3 values, as `first` has"):
        paired_bootstrap(torch.ones(3), torch.ones(4))
