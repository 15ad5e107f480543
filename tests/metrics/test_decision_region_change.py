"""Near and far are kept apart, and what there is to say where nothing changed."""

import math

import pytest
import torch

from lightning_unlearn.functional.decision_regions import PlaneSampling, region_points
from lightning_unlearn.metrics import DecisionRegionChange

OLD, NEW = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([1, 1, 0, 1, 1])
"""Three of five changed."""


def test_shares_and_their_ratio_by_place():
    metric = DecisionRegionChange()
    metric.update(OLD, NEW, near=True)
    metric.update(OLD[:1], NEW[:1], near=True)
    metric.update(OLD[:4], torch.nn.functional.one_hot(NEW[:4]).float(), near=False)
    value = {key: item.item() for key, item in metric.compute().items()}
    assert value == {"near_change": 4 / 6, "far_change": 0.5, "near_to_far": pytest.approx(4 / 3)}


@pytest.mark.parametrize(("near", "ratio"), [(NEW, math.inf), (OLD, math.nan)])
def test_the_ratio_where_nothing_changed_elsewhere(near, ratio):
    metric = DecisionRegionChange()
    metric.update(OLD, near, near=True)
    assert metric.compute()["far_change"].isnan()
    metric.update(OLD, OLD, near=False)
    value = metric.compute()
    assert value["far_change"].item() == 0
    assert value["near_to_far"].item() == pytest.approx(ratio, nan_ok=True)


def test_a_local_change_is_seen_near_and_not_far():
    """The second model differs from the first within 0.5 of the origin alone, where the forgotten samples are."""
    forgotten, held_out = torch.randn(5, 3) * 0.1, torch.randn(8, 3) + 10
    metric, sampling = DecisionRegionChange(), PlaneSampling(resolution=9, radius=0.2)
    for anchors, near in ((forgotten, True), (held_out, False)):
        for points in region_points(anchors, held_out, sampling=sampling):
            before = (points[:, 0] > 10).long()
            metric.update(before, torch.where(points.norm(dim=1) < 0.5, 1 - before, before), near=near)
    value = metric.compute()
    assert value["near_change"] > 0.5
    assert value["far_change"].item() == 0
