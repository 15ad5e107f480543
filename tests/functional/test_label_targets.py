"""Divergences from label distributions against sums written out in float64."""

import math

import pytest
import torch

from lightning_unlearn.functional.label_targets import answer_divergence, label_distribution, yes_no_divergence

LOGITS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
LABELS = torch.tensor([0, 3, 1, 1, 2])


def by_hand(logits, target, reverse):
    """KL of one row, term by term."""
    weights = [math.exp(value) for value in logits]
    p, t = [value / sum(weights) for value in weights], list(target)
    if reverse:
        p, t = t, p
    return sum(a * math.log(a / b) for a, b in zip(t, p, strict=True) if a > 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_term_by_term(smoothing, reverse):
    target = label_distribution(LABELS, 4, smoothing)
    for row, label in zip(target, LABELS, strict=True):
        wanted = [smoothing / 4 + (1 - smoothing) * (place == int(label)) for place in range(4)]
        assert row.tolist() == pytest.approx(wanted)
    found = answer_divergence(LOGITS, target, reverse=reverse)
    if reverse and smoothing == 0.0:
        assert torch.isinf(found).all()
        return
    wanted = [by_hand(row.tolist(), to.double().tolist(), reverse) for row, to in zip(LOGITS, target, strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    assert bool((found >= 0).all())


def test_one_hot_is_cross_entropy():
    found = answer_divergence(LOGITS, label_distribution(LABELS, 4, 0.0))
    wanted = torch.nn.functional.cross_entropy(LOGITS, LABELS, reduction="none")
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients(reverse):
    logits = LOGITS.clone().requires_grad_()
    target = label_distribution(LABELS, 4, 0.2).double()
    assert torch.autograd.gradcheck(lambda z: answer_divergence(z, target, reverse=reverse), logits)
    assert torch.autograd.gradcheck(lambda z: yes_no_divergence(z, target, reverse=reverse), logits)
    sure = logits.detach().clone().mul_(1000).requires_grad_()
    answer_divergence(sure, label_distribution(LABELS, 4, 0.0)).sum().backward()
    assert torch.isfinite(sure.grad).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_yes_and_no(reverse):
    target = torch.tensor([[0.05, 0.95, 0.5, 0.3]]).double().expand(5, 4)
    found = yes_no_divergence(LOGITS, target, reverse=reverse)
    for (row, column), value in {(r, c): found[r, c] for r in range(5) for c in range(4)}.items():
        yes = float(target[row, column])
        wanted = by_hand([float(LOGITS[row, column]), 0.0], [yes, 1 - yes], reverse)
        assert float(value) == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_positions_of_an_image():
    targets = torch.tensor([[[0, 1], [2, -100]]])
    target = label_distribution(targets, 3, 0.3)
    assert target.shape == (1, 3, 2, 2)
    assert target.sum(1).flatten().tolist() == pytest.approx([1.0] * 4)
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    found = answer_divergence(logits, target)
    assert found.shape == (1, 2, 2)
    pixel = by_hand(logits[0, :, 0, 1].tolist(), target[0, :, 0, 1].tolist(), False)
    assert float(found[0, 0, 1]) == pytest.approx(pixel, rel=1e-5)


def test_shapes_are_checked():
    for function in (answer_divergence, yes_no_divergence):
        with pytest.raises(ValueError, match="shape"):
            function(LOGITS, LABELS.double())
