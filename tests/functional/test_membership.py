"""The membership attack against scikit-learn and written-out loops."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score, roc_curve

from lightning_unlearn.functional.membership import (
    cross_entropy_per_sample,
    membership_accuracy,
    membership_auroc,
    membership_auroc_error,
    membership_tpr_at_fpr,
)


def losses(kind, members=30, nonmembers=47):
    generator = torch.Generator().manual_seed(4)
    member = torch.randn(members, generator=generator).exp()
    nonmember = torch.randn(nonmembers, generator=generator).exp() * 1.5
    if kind == "ties":
        member, nonmember = (member * 2).round(), (nonmember * 2).round()
    if kind == "constant":
        member, nonmember = torch.ones(members), torch.ones(nonmembers)
    if kind == "infinite":
        member[0], nonmember[:3] = math.inf, math.inf
    return member, nonmember


def as_sklearn(member, nonmember):
    truth = np.concatenate([np.ones(len(member)), np.zeros(len(nonmember))])
    score = -torch.cat([member, nonmember]).double().numpy()
    return truth, np.where(np.isinf(score), -1e9, score)


@pytest.mark.parametrize("kind", ["plain", "ties", "constant", "infinite"])
def test_auroc_equals_scikit_learn_and_pair_counting(kind):
    member, nonmember = losses(kind)
    value = membership_auroc(member, nonmember)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(roc_auc_score(*as_sklearn(member, nonmember)), abs=1e-12)
    counted = sum((m < n) + 0.5 * (m == n) for m in member.tolist() for n in nonmember.tolist())
    assert value.item() == pytest.approx(counted / len(member) / len(nonmember), abs=1e-12)


def test_auroc_of_members_that_fit_better_is_above_one_half():
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 2.0])
    assert membership_auroc(member_losses=low, nonmember_losses=high).item() == 1
    assert membership_auroc(member_losses=high, nonmember_losses=low).item() == 0


@pytest.mark.parametrize("kind", ["plain", "ties", "constant"])
@pytest.mark.parametrize("fpr", [0.0, 0.001, 0.01, 0.1, 0.5, 1.0])
def test_rate_at_few_false_alarms_equals_scikit_learns_curve(kind, fpr):
    member, nonmember = losses(kind)
    accused, found, _ = roc_curve(*as_sklearn(member, nonmember), drop_intermediate=False)
    assert membership_tpr_at_fpr(member, nonmember, fpr).item() == pytest.approx(found[accused <= fpr].max(), abs=1e-12)


@pytest.mark.parametrize("kind", ["plain", "ties", "constant"])
def test_accuracy_is_the_best_over_all_thresholds(kind):
    member, nonmember = losses(kind)
    thresholds = [-math.inf, *torch.cat([member, nonmember]).tolist()]
    best = max(((member <= t).double().mean() + (nonmember > t).double().mean()).item() / 2 for t in thresholds)
    assert membership_accuracy(member, nonmember).item() == pytest.approx(best, abs=1e-12)


def test_everything_is_invariant_to_increasing_maps_of_the_loss():
    member, nonmember = losses("ties")
    for function in (membership_auroc, membership_accuracy, lambda a, b: membership_tpr_at_fpr(a, b, 0.1)):
        assert function(member, nonmember) == function(member.sqrt() + 3, nonmember.sqrt() + 3)


def test_standard_error_agrees_with_simulation():
    # For exponential losses the formula is exact.
    generator = torch.Generator().manual_seed(5)
    draws = torch.empty(3000, 20 + 200).exponential_(generator=generator)
    areas = torch.stack([membership_auroc(row[:20], row[20:] * 2) for row in draws])
    assert areas.mean().item() == pytest.approx(2 / 3, abs=0.005)
    assert membership_auroc_error(2 / 3, 20, 200) == pytest.approx(areas.std().item(), rel=0.05)


def test_twenty_members_give_seven_hundredths():
    assert 0.06 < membership_auroc_error(0.5, 20, 360) < 0.075


def test_cross_entropy_equals_scikit_learn_and_does_not_round_to_zero():
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(6))
    targets = torch.arange(40) % 5
    values = cross_entropy_per_sample(logits, targets)
    probabilities = logits.double().softmax(1).numpy()
    for row in range(40):
        oracle = log_loss([targets[row].item()], probabilities[row : row + 1], labels=range(5))
        assert values[row].item() == pytest.approx(oracle, rel=1e-12)
    sure = cross_entropy_per_sample(torch.tensor([[30.0, 0.0], [25.0, 0.0]]), torch.tensor([0, 0]))
    assert 0 < sure[0] < sure[1] < 1e-10


@pytest.mark.parametrize("function", [membership_auroc, membership_accuracy])
@pytest.mark.parametrize("bad", [torch.tensor([]), torch.tensor([[1.0]]), torch.tensor([1.0, math.nan])])
def test_refuses_empty_shapeless_and_nan(function, bad):
    good = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="member_losses"):
        function(bad, good)
    with pytest.raises(ValueError, match="nonmember_losses"):
        function(good, bad)


def test_refuses_a_rate_outside_the_unit_interval():
    with pytest.raises(ValueError, match="fpr"):
        membership_tpr_at_fpr(torch.ones(1), torch.ones(1), 1.5)
    with pytest.raises(ValueError, match="shapes"):
        cross_entropy_per_sample(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))
