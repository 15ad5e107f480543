"""Who counts as a member, and when there is no result."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from lightning_unlearn.metrics import LossThresholdAttack

LOW, HIGH = torch.linspace(0.1, 1.2, 12), torch.linspace(0.8, 2.0, 15)


def test_splits_and_masks_say_the_same():
    by_split, by_mask = LossThresholdAttack(), LossThresholdAttack()
    by_split.update(LOW, split="forget")
    by_split.update(HIGH, split="test")
    mask = torch.cat([torch.ones(12), torch.zeros(15)]).bool()
    by_mask.update(torch.cat([LOW, HIGH]), mask)
    assert by_split.compute() == by_mask.compute()
    expected = roc_auc_score(mask, -torch.cat([LOW, HIGH]))
    assert by_split.compute()["membership_auroc"].item() == pytest.approx(expected)


def test_members_and_nonmembers_are_not_exchanged():
    metric = LossThresholdAttack()
    metric.update(LOW, split="forget")
    metric.update(HIGH, split="test")
    value = metric.compute()
    assert value["membership_auroc"] > 0.9
    assert value["membership_tpr_at_1e-3_fpr"] > 0.5
    assert 0 < value["membership_auroc_error"] < 0.1


def test_retain_samples_are_refused_as_nonmembers():
    metric = LossThresholdAttack()
    with pytest.raises(ValueError, match="retain samples, so they cannot stand for non-members"):
        metric.update(HIGH, split="retain")
    assert metric.nonmember_losses == []


@pytest.mark.parametrize(
    ("args", "keywords", "match"),
    [
        ((LOW,), {}, "exactly one"),
        ((LOW, torch.ones(12).bool()), {"split": "test"}, "exactly one"),
        ((LOW,), {"split": "train"}, "split"),
        ((LOW, torch.ones(11).bool()), {}, "bool vector of 12"),
        ((LOW, torch.ones(12)), {}, "bool vector"),
        ((LOW.unsqueeze(0),), {"split": "test"}, "losses"),
        ((torch.tensor([float("nan")]),), {"split": "test"}, "losses"),
    ],
)
def test_refuses_unclear_updates(args, keywords, match):
    with pytest.raises(ValueError, match=match):
        LossThresholdAttack().update(*args, **keywords)


@pytest.mark.parametrize("counts", [(12, 0), (0, 15), (9, 15), (12, 9)])
def test_too_few_samples_give_no_number(counts):
    metric = LossThresholdAttack()
    metric.update(LOW[: counts[0]], split="forget")
    metric.update(HIGH[: counts[1]], split="test")
    with pytest.raises(ValueError, match="at least 10 members"):
        metric.compute()


def test_forward_gives_a_batchs_own_result_or_none_and_loses_nothing():
    metric = LossThresholdAttack(min_samples=10)
    assert metric(LOW, split="forget") == {}
    mask = torch.arange(30) % 2 == 0
    mixed = torch.linspace(0.5, 1.5, 30)
    assert set(metric(mixed, mask)) == set(metric.compute())
    whole = LossThresholdAttack()
    whole.update(torch.cat([LOW, mixed]), torch.cat([torch.ones(12).bool(), mask]))
    assert metric.compute() == whole.compute()


def test_losses_keep_their_resolution_near_zero():
    metric = LossThresholdAttack(min_samples=1)
    metric.update(torch.tensor([1e-14, 3e-14], dtype=torch.float64), split="forget")
    metric.update(torch.tensor([2e-14, 4e-14], dtype=torch.float64), split="test")
    assert metric.compute()["membership_auroc"].item() == 0.75
