"""Global thresholds and dampening factors against loops."""

from fractions import Fraction

import pytest
import torch

from lightning_unlearn.functional.saliency import alpha_of_share, dampening_factors, saliency_masks


def scores(seed=0, shapes=((7, 5), (11,), (), (2, 3, 4))):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("density", [0.01, 0.29, 0.5, 0.999, 1.0])
def test_exactly_the_share_and_the_largest(density):
    tensors = scores()
    masks = saliency_masks(tensors, density)
    assert [mask.shape for mask in masks] == [one.shape for one in tensors]
    flat = torch.cat([one.flatten().abs() for one in tensors])
    chosen = torch.cat([mask.flatten() for mask in masks])
    assert int(chosen.sum()) == int(Fraction(str(density)) * flat.numel())
    if 0 < int(chosen.sum()) < flat.numel():
        assert float(flat[chosen].min()) >= float(flat[~chosen].max())


def test_one_threshold_over_all_tensors():
    small, large = torch.full((10,), 0.1), torch.full((10,), 5.0)
    first, second = saliency_masks([small, large], 0.5)
    assert not first.any()
    assert second.all()


def test_the_share_is_the_decimal_one_and_zeros_fill_up_in_order():
    assert int(saliency_masks([torch.randn(100)], 0.29)[0].sum()) == 29  # int(0.29 * 100) is 28
    assert saliency_masks([torch.tensor([0.0, 0.0, -2.0, 0.0])], 0.5)[0].tolist() == [True, False, True, False]
    assert saliency_masks([torch.ones(4)], 0.5)[0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("alpha", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("strength", [0.1, 1.0, 3.0])
def test_dampening_against_a_loop(alpha, strength):
    generator = torch.Generator().manual_seed(1)
    forget = torch.rand(200, generator=generator) * (torch.rand(200, generator=generator) > 0.2)
    whole = torch.rand(200, generator=generator) * (torch.rand(200, generator=generator) > 0.2) * 0.3
    found = dampening_factors(forget, whole, alpha=alpha, strength=strength)
    assert torch.isfinite(found).all()
    for factor, f, d in zip(found.tolist(), forget.tolist(), whole.tolist(), strict=True):
        wanted = min(strength * d / f, 1.0) if f > alpha * d else 1.0
        assert factor == pytest.approx(wanted, rel=1e-5)
    assert ((found >= 0) & (found <= 1)).all()


def test_limits_of_dampening():
    forget, whole = torch.tensor([5.0, 0.0, 3.0]), torch.tensor([0.0, 0.0, 1.0])
    assert dampening_factors(forget, whole, alpha=1.0, strength=1.0)[0] == 0.0
    assert dampening_factors(forget, whole, alpha=1.0, strength=1.0)[1] == 1.0
    assert dampening_factors(forget, whole, alpha=2.9, strength=10.0)[2] == 1.0
    assert dampening_factors(forget[1:], whole[1:], alpha=1e9, strength=0.0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("share", [0.001, 0.01, 0.13, 0.9, 1.0])
def test_a_share_is_the_largest_ratios(share):
    generator = torch.Generator().manual_seed(2)
    forget = torch.rand(300, generator=generator) + 1e-3
    whole = torch.rand(300, generator=generator) + 1e-3
    alpha = alpha_of_share(forget, whole, share)
    selected = dampening_factors(forget, whole, alpha=alpha, strength=0.0) == 0.0
    count = max(1, int(Fraction(str(share)) * 300))
    ratios = sorted((f / d for f, d in zip(forget.tolist(), whole.tolist(), strict=True)), reverse=True)
    assert int(selected.sum()) == count
    assert float((forget / whole)[selected].min()) == pytest.approx(ratios[count - 1], rel=1e-6)


def test_entries_that_matter_to_nothing_are_never_selected():
    forget, whole = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 1.0])
    alpha = alpha_of_share(forget, whole, 0.5)
    assert dampening_factors(forget, whole, alpha=alpha, strength=0.0).tolist() == [1.0, 1.0, 0.0]
