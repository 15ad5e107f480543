"""Which sample belongs to which group, and when there is no result."""

import math

import pytest
import torch

from lightning_unlearn.functional.prediction_scores import modified_entropy
from lightning_unlearn.functional.privacy_risk import privacy_risk_score
from lightning_unlearn.metrics import PrivacyRiskScore


def batch(count, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    logits = torch.randn(count, 3, generator=generator)
    return logits + scale * torch.nn.functional.one_hot(targets, 3), targets


TARGETS, MEMBERS, NONMEMBERS = batch(30, 3.0, 0), batch(90, 4.0, 1), batch(60, 1.0, 2)


def filled(metric):
    """Batches of the groups mixed, so that the order of the target samples has to be kept."""
    metric.update(*NONMEMBERS, group="shadow_nonmember")
    metric.update(TARGETS[0][:7], TARGETS[1][:7], group="target")
    metric.update(*MEMBERS, group="shadow_member")
    metric.update(TARGETS[0][7:], TARGETS[1][7:], group="target")
    return metric


@pytest.mark.parametrize("options", [{}, {"n_bins": 3}, {"log_bins": False}, {"floor": 0.1}])
def test_it_is_the_function_of_the_modified_entropy(options):
    metric = PrivacyRiskScore(**options)
    metric.set_dtype(torch.float64)
    columns = [
        column
        for logits, targets in (TARGETS, MEMBERS, NONMEMBERS)
        for column in (modified_entropy(logits, targets), targets)
    ]
    scores = privacy_risk_score(*columns, **options)
    assert torch.equal(filled(metric).compute_per_sample(), scores)
    assert metric.compute() == scores.mean()
    assert metric.compute().dtype == torch.float64


def test_options_make_a_difference():
    values = {
        filled(PrivacyRiskScore(**o)).compute().item() for o in ({}, {"n_bins": 3}, {"log_bins": False}, {"floor": 0.1})
    }
    assert len(values) == 4


def test_roles_of_shadow_groups_are_not_exchanged():
    metric = filled(PrivacyRiskScore())
    assert metric.compute() > 0.5
    metric.reset()
    metric.update(*TARGETS, group="target")
    metric.update(*NONMEMBERS, group="shadow_member")
    metric.update(*MEMBERS, group="shadow_nonmember")
    assert metric.compute() < 0.5


def test_class_numbers_survive_a_change_of_dtype():
    metric = filled(PrivacyRiskScore())
    before = metric.compute_per_sample()
    metric.set_dtype(torch.float64)
    assert torch.equal(metric.compute_per_sample(), before)


@pytest.mark.parametrize("missing", ["target", "shadow_member", "shadow_nonmember"])
def test_without_a_group_there_is_no_number(missing):
    metric = PrivacyRiskScore()
    for group, data in {"target": TARGETS, "shadow_member": MEMBERS, "shadow_nonmember": NONMEMBERS}.items():
        if group != missing:
            metric.update(*data, group=group)
    for compute in (metric.compute, metric.compute_per_sample):
        with pytest.raises(ValueError, match=f"all three groups, but got .*'{missing}': 0"):
            compute()


def test_a_class_without_shadow_samples_is_named():
    metric = PrivacyRiskScore()
    metric.update(*TARGETS, group="target")
    metric.update(*MEMBERS, group="shadow_member")
    known = NONMEMBERS[1] != 2
    metric.update(NONMEMBERS[0][known], NONMEMBERS[1][known], group="shadow_nonmember")
    with pytest.raises(ValueError, match=r"shadow_nonmember_labels.*none of class 2"):
        metric.compute()


@pytest.mark.parametrize(
    ("args", "group", "match"),
    [
        (TARGETS, "forget", "one of 'target', 'shadow_member', 'shadow_nonmember'"),
        ((TARGETS[0], TARGETS[1][:5]), "target", "of shape"),
        ((torch.tensor([[0.0, -math.inf]]), torch.tensor([1])), "target", "finite"),
    ],
)
def test_a_refused_update_leaves_nothing_behind(args, group, match):
    metric = PrivacyRiskScore()
    with pytest.raises(ValueError, match=match):
        metric.update(*args, group=group)
    assert metric.scores == metric.labels == metric.groups == []


@pytest.mark.parametrize("options", [{"n_bins": 0}, {"floor": -1.0}])
def test_refuses_options_at_construction(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PrivacyRiskScore(**options)


def test_logits_with_a_graph_are_let_go():
    logits = TARGETS[0].clone().requires_grad_()
    metric = PrivacyRiskScore()
    metric.update(logits, TARGETS[1], group="target")
    assert not metric.scores[0].requires_grad


def per_sample_of_two():
    """Run inside the pool: target samples shared between the ranks, one shadow group on each."""
    rank = torch.distributed.get_rank()
    metric = PrivacyRiskScore()
    own = slice(0, 7) if rank == 0 else slice(7, None)
    metric.update(TARGETS[0][own], TARGETS[1][own], group="target")
    metric.update(*(MEMBERS, NONMEMBERS)[rank], group=("shadow_member", "shadow_nonmember")[rank])
    first = metric.compute_per_sample()
    return first, metric.compute_per_sample(), metric.compute()


def test_scores_of_samples_are_gathered_and_the_states_given_back(gloo_pool):
    whole = filled(PrivacyRiskScore())
    for first, again, mean in gloo_pool.run(per_sample_of_two):
        assert torch.equal(first, whole.compute_per_sample())
        assert torch.equal(again, first)
        assert mean == whole.compute()
