"""Numbers with their error, where an interval can be given and where not."""

import math

import pytest
import torch
from scipy import stats

from lightning_unlearn.procedures.comparison import noise_floor
from lightning_unlearn.procedures.measured import measured_auroc, measured_mean, measured_share


def test_a_mean_has_students_interval_unless_there_is_none():
    values = torch.tensor([0.1, 0.5, 0.6, 2.0], dtype=torch.float64)
    found = measured_mean(values)
    assert found.spread == pytest.approx(stats.sem(values))
    assert found.interval == pytest.approx(stats.t.interval(0.95, 3, values.mean(), stats.sem(values)))
    assert measured_mean(torch.tensor([0.5])).interval is None
    broken = measured_mean(torch.tensor([0.5, math.inf]))
    assert (broken.value, broken.interval) == (math.inf, None)


@pytest.mark.parametrize(("right", "of"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (999, 1000)])
def test_a_share_lies_in_its_interval_which_is_never_a_point(right, of):
    low, high = measured_share(torch.arange(of) < right).interval
    assert 0 <= low <= right / of <= high <= 1
    assert high > low


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_the_interval_of_a_share_covers_it_as_often_as_it_says(share):
    """Summed over all outcomes of thirty trials, not drawn."""
    covered = 0.0
    for right in range(31):
        low, high = measured_share(torch.arange(30) < right).interval
        covered += stats.binom.pmf(right, 30, share) * (low <= share <= high)
    assert covered > 0.93


def test_an_area_has_an_interval_only_where_its_error_means_something():
    members, others = torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.2, 1.0, 1.5])
    found = measured_auroc(members, others)
    assert 0 < found.interval[0] < found.value < found.interval[1] <= 1
    for separated in (measured_auroc(torch.zeros(3), torch.ones(3)), measured_auroc(torch.ones(3), torch.zeros(3))):
        assert separated.spread == 0
        assert separated.interval is None, "three samples a side do not prove a perfect attack"


def test_a_noise_floor_takes_finite_numbers():
    assert noise_floor([1.0, math.nan]) is None
    assert noise_floor([]) is None
    assert str(noise_floor([1.0, 3.0])) == "2 ± 1.4 (2)"
