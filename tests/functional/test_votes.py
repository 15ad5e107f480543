"""Aggregation of several classifiers' answers against loops over members, samples and classes."""

import math
from collections import Counter

import pytest
import torch
from torch.nn import functional

from lightning_unlearn.functional.votes import aggregate_votes

MEMBERS, SAMPLES, CLASSES = 5, 60, 4


def answers(seed=0, **extra):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(MEMBERS, SAMPLES, CLASSES, *extra.get("places", ()), generator=generator)


def test_the_mean_of_probabilities():
    logits = answers()
    found = aggregate_votes(logits)
    for sample in range(SAMPLES):
        for one in range(CLASSES):
            shares = [
                math.exp(logits[member, sample, one]) / sum(math.exp(value) for value in logits[member, sample])
                for member in range(MEMBERS)
            ]
            assert float(found[sample, one].exp()) == pytest.approx(sum(shares) / MEMBERS, rel=1e-5)


def test_the_majority_wins_and_the_mean_decides_ties():
    logits = answers(1)
    found = aggregate_votes(logits, "majority")
    assert torch.allclose(found.exp().sum(dim=1), torch.ones(SAMPLES), atol=1e-5)
    mean, ties, overruled = aggregate_votes(logits), 0, 0
    for sample in range(SAMPLES):
        votes = Counter(int(logits[member, sample].argmax()) for member in range(MEMBERS))
        most = [one for one, count in votes.items() if count == max(votes.values())]
        winner = max(most, key=lambda one: float(mean[sample, one]))
        assert int(found[sample].argmax()) == winner
        ties += len(most) > 1
        overruled += winner != int(mean[sample].argmax())
    assert ties
    assert overruled, "the votes and the mean agree everywhere, which tests nothing"


def test_one_member_answers_for_itself():
    logits = answers()[:1]
    assert torch.allclose(aggregate_votes(logits), functional.log_softmax(logits[0], dim=1), atol=1e-6)
    assert torch.equal(aggregate_votes(logits, "mean"), logits[0])
    assert torch.equal(aggregate_votes(logits, "majority").argmax(1), logits[0].argmax(1))


def test_classes_of_every_pixel():
    logits = answers(places=(2, 3))
    for vote in ("softmax", "majority"):
        found = aggregate_votes(logits, vote)
        assert found.shape == (SAMPLES, CLASSES, 2, 3)
        assert torch.allclose(found[..., 1, 2], aggregate_votes(logits[..., 1, 2], vote), atol=1e-6)


def test_certain_members_give_finite_losses():
    logits = torch.tensor([[[1e4, -1e4]], [[1e4, -1e4]]])
    for vote in ("softmax", "majority"):
        assert torch.isfinite(functional.cross_entropy(aggregate_votes(logits, vote), torch.tensor([1])))


def test_refusals():
    with pytest.raises(ValueError, match="vote='mean'"):
        aggregate_votes(torch.zeros(3, 4, 1))
    with pytest.raises(ValueError, match="vote='mean'"):
        aggregate_votes(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="at least one member"):
        aggregate_votes(torch.zeros(0, 4, 2))
    with pytest.raises(ValueError, match="one of"):
        aggregate_votes(torch.zeros(3, 4, 2), "loudest")
