"""U-LiRA against SciPy's normal density and written-out folds."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lightning_unlearn.functional.membership import membership_auroc
from lightning_unlearn.functional.u_lira import likelihood_ratios, u_lira, u_lira_accuracy
from tests.functional.test_klom import groups


def by_hand(observed, unlearned, retrained, floor):
    def log_density(group):
        deviation = np.sqrt(np.maximum(group.numpy().var(axis=0), floor))
        return norm.logpdf(observed.numpy(), group.numpy().mean(axis=0), deviation)

    return log_density(unlearned) - log_density(retrained)


@pytest.mark.parametrize("floor", [1e-6, 2.0])
def test_scores_equal_scipys_densities(floor):
    unlearned, retrained = groups(n=11, m=17, shift=1.0, scale=2.0)
    observed, _ = groups(n=5, seed=3)
    scores = likelihood_ratios(observed, unlearned, retrained, variance_floor=floor)
    assert scores.dtype == torch.float64
    np.testing.assert_allclose(scores.numpy(), by_hand(observed, unlearned, retrained, floor), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_nobody_is_attacked_with_a_fit_that_saw_it(folds):
    unlearned, retrained = groups(n=11, m=13, shift=0.5)
    scores = u_lira(unlearned, retrained, folds=folds)
    for mine, group in zip(scores, (unlearned, retrained), strict=True):
        for position in range(len(group)):
            fits = [
                torch.stack([row for place, row in enumerate(every) if place % folds != position % folds])
                for every in (unlearned, retrained)
            ]
            expected = by_hand(group[position], *fits, 1e-6)
            np.testing.assert_allclose(mine[position].numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("observed", [torch.zeros(3), torch.zeros(2, 6), torch.full((2, 7), float("nan"))])
def test_refuses_other_samples(observed):
    with pytest.raises(ValueError, match=r"`observed` to be of shape \(attacked, 7\)"):
        likelihood_ratios(observed, *groups())


def test_accuracy_counts():
    unlearned, retrained = torch.randn(9, 4), torch.randn(7, 4)
    unlearned[0, 0] = 0.0
    expected = [
        0.5 * np.mean([(s > 0) + 0.5 * (s == 0) for s in unlearned[:, x].tolist()])
        + 0.5 * np.mean([(s < 0) + 0.5 * (s == 0) for s in retrained[:, x].tolist()])
        for x in range(4)
    ]
    np.testing.assert_allclose(u_lira_accuracy(unlearned, retrained).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("folds", [2, 5])
def test_one_distribution_is_at_chance_even_with_few_models(folds):
    """800 samples of their own models each: the standard error is below 0.008."""
    scores = u_lira(*groups(n=6, m=6, samples=800), folds=folds)
    assert u_lira_accuracy(*scores).mean().item() == pytest.approx(0.5, abs=0.03)
    assert membership_auroc(-scores[0].flatten(), -scores[1].flatten()).item() == pytest.approx(0.5, abs=0.03)


def test_two_distributions_are_told_apart_as_well_as_can_be():
    """Of two unit Gaussians at a distance of 2, the best rule is right with probability Phi(1) = 0.841."""
    scores = u_lira(*groups(n=60, m=60, samples=150, shift=2.0))
    assert u_lira_accuracy(*scores).mean().item() == pytest.approx(norm.cdf(1), abs=0.02)
    wide = u_lira(*groups(n=60, m=60, samples=150, scale=5.0))
    assert 0.75 < u_lira_accuracy(*wide).mean() < 0.85, "equal means, other variances"


def test_models_that_all_agree_need_the_floor():
    scores = u_lira(torch.ones(5, 1), torch.zeros(5, 1))
    assert all(one.isfinite().all() for one in scores)
    assert u_lira_accuracy(*scores).item() == 1
    assert u_lira_accuracy(*u_lira(torch.ones(5, 1), torch.ones(5, 1))).item() == 0.5


@pytest.mark.parametrize(
    ("sizes", "options", "match"),
    [
        ((4, 9), {}, "`unlearned` to be of shape .* at least 5 models"),
        ((9, 2), {"folds": 3}, "`retrained` to be of shape .* at least 3 models"),
        ((3, 3), {"folds": 2}, "at least 4 models"),
        ((9, 9), {"folds": 1}, "folds"),
        ((9, 9), {"variance_floor": 0.0}, "variance_floor"),
    ],
)
def test_refuses(sizes, options, match):
    with pytest.raises(ValueError, match=match):
        u_lira(torch.randn(sizes[0], 2), torch.randn(sizes[1], 2), **options)
