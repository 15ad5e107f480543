"""The competition's score against loops over rules and models, and planted groups."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.functional.forgetting_score import (
    bucket_points,
    competition_score,
    forgetting_epsilons,
    forgetting_score,
)
from tests.functional.test_klom import groups

DELTA = 1e-5


def rates(rule, positive, negative):
    return np.mean([rule(one) for one in negative]), np.mean([not rule(one) for one in positive])


def epsilon_of(fpr, fnr):
    """Of one rule; None where it is dropped."""
    if fpr == 0 and fnr == 0:
        return math.inf
    if fpr == 0 or fnr == 0:
        return None
    bounds = [
        math.log(1 - DELTA - one) - math.log(other) for one, other in ((fpr, fnr), (fnr, fpr)) if 1 - DELTA - one > 0
    ]
    return max([0.0, *bounds]) if bounds else None


def by_loops(unlearned, retrained, resolution):
    """One sample, one rule, one model after the other."""
    unlearned, retrained = unlearned.tolist(), retrained.tolist()
    widths = [max(group) - min(group) for group in (unlearned, retrained)]
    if min(widths) / max(widths) < 0.01:
        return 50.0
    swap = np.median(retrained) > np.median(unlearned)
    positive, negative = (retrained, unlearned) if swap else (unlearned, retrained)
    low, high = min(positive + negative), max(positive + negative)
    found = [
        epsilon_of(*rates(lambda one, t=t: one >= t, positive, negative))
        for t in np.linspace(low, high, math.ceil((high - low) * resolution))
    ]
    first, second = max(positive) - min(positive), max(negative) - min(negative)
    peaky, broad = (negative, positive) if first >= second else (positive, negative)
    for right in np.linspace(max(peaky) - 2, max(peaky) + 2, 4 * resolution):
        edge = right - min(first, second)
        found += [
            epsilon_of(*rates(lambda one, a=left, b=right: a <= one <= b, peaky, broad))
            for left in np.linspace(edge - 2, edge + 2, 4 * resolution)
        ]
    found = [one for one in found if one is not None]
    return min(max(found), 50.0) if found else math.nan


@pytest.mark.parametrize("options", [{}, {"shift": 1.0}, {"shift": -1.5, "scale": 0.5}, {"scale": 3.0}, {"shift": 9.0}])
@pytest.mark.parametrize("sizes", [(8, 8), (5, 9)])
def test_epsilons_equal_loops(options, sizes):
    pair = groups(n=sizes[0], m=sizes[1], samples=3, **options)
    value = forgetting_epsilons(*pair, resolution=7)
    assert value.dtype == torch.float64
    expected = [by_loops(pair[0][:, x], pair[1][:, x], 7) for x in range(3)]
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(-6, 6), min_size=3, max_size=6),
    st.lists(st.integers(-6, 6), min_size=3, max_size=6).filter(lambda values: len(set(values)) > 1),
)
def test_epsilons_equal_loops_on_ties(first, second):
    pair = tuple(torch.tensor(values, dtype=torch.float64) / 2.1 for values in (first, second))
    value = forgetting_epsilons(*(one.unsqueeze(1) for one in pair), resolution=3)
    np.testing.assert_allclose(value.numpy(), [by_loops(*pair, 3)], rtol=1e-9, atol=1e-12)


def test_two_epsilons_by_hand():
    """At t = 0.5, one of ten retrained models is accused and two of ten unlearned ones are missed."""
    unlearned = torch.tensor([1.0] * 8 + [0.0] * 2).unsqueeze(1)
    retrained = torch.tensor([1.0] + [0.0] * 9).unsqueeze(1)
    assert forgetting_epsilons(unlearned, retrained).item() == pytest.approx(math.log((0.8 - DELTA) / 0.1), rel=1e-9)


def test_corners():
    one, other = torch.zeros(4, 1), torch.ones(4, 1)
    assert forgetting_epsilons(one, one).item() == 0
    assert forgetting_epsilons(one, other).item() == 50
    spread = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert forgetting_epsilons(one, spread).item() == 50, "one group is peaky, which the competition counts as worst"
    assert forgetting_epsilons(one, spread, cap=20.0).item() == 20
    assert forgetting_epsilons(spread, spread).item() == 0
    assert forgetting_epsilons(spread + 40, spread).item() == 50
    # Too close together for a threshold of the grid to lie between: no rule is left, and no points are given.
    close = forgetting_epsilons(spread * 1e-3, spread.flip(0) * 1.5e-3, resolution=1)
    assert close.isnan().all()
    assert bucket_points(close, 4).item() == 0


@pytest.mark.parametrize(("models", "last"), [(3, 1), (4, 3), (512, 13), (1024, 13), (8, 3)])
def test_points_halve_and_end(models, last):
    """Buckets of width 0.5 up to ceil(ln(models - 1)), written out."""
    points, start, expected = 1.0, 0.0, {}
    while start + 0.5 <= math.ceil(math.log(models - 1)):
        expected[start] = points
        start, points = start + 0.5, points / 2
    assert len(expected) == last + 1
    for begin, value in expected.items():
        for epsilon in (begin, begin + 0.499):
            assert bucket_points(torch.tensor([epsilon]), models).item() == value
    assert bucket_points(torch.tensor([start, 50.0, math.inf]), models).tolist() == [0, 0, 0]


def test_one_distribution_scores_high_and_two_score_low():
    same = forgetting_score(*groups(n=128, m=128, samples=12), resolution=25)
    shifted = forgetting_score(*groups(n=128, m=128, samples=12, shift=3.0), resolution=25)
    peaky = forgetting_score(*groups(n=128, m=128, samples=12, scale=0.2), resolution=25)
    # Intervals and thresholds are searched, so chance alone costs points: with 128 models 1 is suspect.
    assert 0.1 < same < 0.6
    assert shifted < 0.02
    assert peaky < same / 2
    models, _ = groups(n=20, samples=4)
    assert forgetting_score(models, models).item() == 1


def test_final_score():
    pair = torch.tensor([0.8, 0.9]), torch.tensor([1.0, 0.7, 0.85])
    value = competition_score(torch.tensor(0.5), retain_accuracies=pair, test_accuracies=(pair[1], pair[0]))
    assert value.item() == pytest.approx(0.5)
    assert competition_score(0.5, retain_accuracies=pair, test_accuracies=pair).item() == pytest.approx(0.5)
    less = competition_score(1.0, retain_accuracies=(pair[0] / 2, pair[1]), test_accuracies=pair)
    assert less.item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="test_accuracies"):
        competition_score(1.0, retain_accuracies=pair, test_accuracies=(pair[0], torch.zeros(2)))


@pytest.mark.parametrize(
    ("models", "options", "match"),
    [(2, {}, "at least 3 models"), (4, {"delta": 2.0}, "delta"), (4, {"resolution": 0}, "resolution")],
)
def test_refuses(models, options, match):
    with pytest.raises(ValueError, match=match):
        forgetting_score(torch.randn(models, 2), torch.randn(5, 2), **options)
    with pytest.raises(ValueError, match="models"):
        bucket_points(torch.zeros(1), 2)
