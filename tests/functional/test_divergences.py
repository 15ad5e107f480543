"""KL and Jensen-Shannon against scipy, and the corners where naive formulas give NaN."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax

from lightning_unlearn.functional.divergences import js_to_reference, kl_to_reference


def logits(scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return tuple((torch.randn(50, 7, generator=generator) * scale).to(dtype) for _ in range(2))


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_scipy(scale, dtype):
    model, reference = logits(scale, dtype)
    p, q = (softmax(item.double().numpy(), axis=1) for item in (reference, model))
    kl = kl_to_reference(model, reference)
    assert kl.dtype == torch.float64
    assert kl.shape == (50,)
    np.testing.assert_allclose(kl.numpy(), rel_entr(p, q).sum(1), rtol=1e-9, atol=1e-13)
    js = js_to_reference(model, reference).numpy()
    np.testing.assert_allclose(js, jensenshannon(p, q, axis=1) ** 2, rtol=1e-9, atol=1e-13)


def test_same_outputs_are_at_zero():
    model, _ = logits()
    shifted = model + 7.25
    assert kl_to_reference(model, model).abs().max() == 0
    assert js_to_reference(model, model).abs().max() < 1e-15
    assert kl_to_reference(shifted, model).max() < 1e-6
    assert kl_to_reference(model.double().log_softmax(1), model.double()).max() < 1e-12


def test_which_side_is_the_reference():
    wide, sure = torch.zeros(1, 4), torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]])
    assert kl_to_reference(wide, reference_logits=sure).item() == pytest.approx(math.log(4))
    assert kl_to_reference(sure, reference_logits=wide).item() == math.inf


def test_js_is_symmetric_and_bounded():
    model, reference = logits(100.0)
    forward, back = js_to_reference(model, reference), js_to_reference(reference, model)
    torch.testing.assert_close(forward, back, rtol=0, atol=1e-14)
    assert 0 <= forward.min() <= forward.max() <= math.log(2) + 1e-15
    sure = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert js_to_reference(sure, sure).item() == 0
    assert js_to_reference(sure, sure.roll(1, dims=1)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("function", [kl_to_reference, js_to_reference])
def test_refuses_other_shapes(function):
    with pytest.raises(ValueError, match=r"here \(2, 3\)"):
        function(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"\(N, C\)"):
        function(torch.zeros(3), torch.zeros(3))
