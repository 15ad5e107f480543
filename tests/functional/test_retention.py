"""Masks of kept entries against sorting every entry in a loop."""

import math
from fractions import Fraction

import pytest
import torch

from lightning_unlearn.functional.retention import kept_masks

SCORES = [
    torch.rand(7, 3, generator=torch.Generator().manual_seed(0)),
    torch.rand(10, generator=torch.Generator().manual_seed(1)) * 5,
    torch.tensor(0.3),
]


def by_sorting(values, keep, of):
    """Positions kept of a list of scores."""
    count = math.ceil(Fraction(str(keep)) * len(values))
    order = sorted(range(len(values)), key=lambda place: -values[place])
    return set(order[:count]) if of == "largest" else set(order[len(values) - count :])


@pytest.mark.parametrize("of", ["largest", "smallest"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1.0])
def test_layer_by_layer(keep, of):
    for score, mask in zip(SCORES, kept_masks(SCORES, keep, of=of), strict=True):
        assert mask.shape == score.shape
        wanted = by_sorting(score.flatten().tolist(), keep, of)
        assert set(torch.nonzero(mask.flatten()).flatten().tolist()) == wanted


@pytest.mark.parametrize("of", ["largest", "smallest"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_all_together(keep, of):
    masks = kept_masks(SCORES, keep, of=of, scope="global")
    assert [mask.shape for mask in masks] == [score.shape for score in SCORES]
    flat = torch.cat([score.flatten() for score in SCORES]).tolist()
    found = torch.cat([mask.flatten() for mask in masks])
    assert set(torch.nonzero(found).flatten().tolist()) == by_sorting(flat, keep, of)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("of", ["largest", "smallest"])
def test_zeros_and_ties_do_not_change_the_count(scope, of):
    masks = kept_masks([torch.zeros(6), torch.ones(4)], 0.5, of=of, scope=scope)
    assert sum(int(mask.sum()) for mask in masks) == 5
    if scope == "layer":
        assert [int(mask.sum()) for mask in masks] == [3, 2]


def test_scores_must_be_finite():
    with pytest.raises(ValueError, match="finite"):
        kept_masks([torch.tensor([1.0, float("nan")])], 0.5)
