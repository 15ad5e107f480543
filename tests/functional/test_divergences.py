"""KL, Jensen-Shannon, activation distance and ZRF against scipy, and the corners where naive formulas give NaN."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax
from torch.nn import functional

from lightning_unlearn.functional.divergences import (
    activation_distance,
    js_to_reference,
    kl_to_reference,
    zero_retrain_forgetting,
)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("l1", 1)])
def test_activation_distance_is_the_norm_of_the_difference_of_probabilities(norm, order, dtype):
    model, reference = logits(dtype=dtype)
    p, q = (softmax(item.double().numpy(), axis=1) for item in (model, reference))
    found = activation_distance(model, reference, norm=norm)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), np.linalg.norm(p - q, ord=order, axis=1), rtol=1e-12)
    assert activation_distance(model, model, norm=norm).abs().max() == 0


def test_activation_distance_reaches_its_bounds_where_answers_are_disjoint():
    sure = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert activation_distance(sure, sure.roll(1, dims=1)).item() == pytest.approx(math.sqrt(2))
    assert activation_distance(sure, sure.roll(1, dims=1), norm="l1").item() == 2


def test_zrf_is_one_minus_the_textbook_divergence():
    model, teacher = logits()
    p, q = (softmax(item.double().numpy(), axis=1) for item in (model, teacher))
    expected = 1 - jensenshannon(p, q, axis=1) ** 2
    np.testing.assert_allclose(zero_retrain_forgetting(model, teacher).numpy(), expected, rtol=1e-9)
    assert (zero_retrain_forgetting(model, model) - 1).abs().max() < 1e-15


def authors_zrf(model, teacher):
    """`UnLearningScore` of the authors' repository, from the formulas of its two lines."""
    p, q = model.softmax(1), teacher.softmax(1)
    m = (p + q) / 2
    return 1 - 0.5 * functional.kl_div(p.log(), m, reduction="mean") - 0.5 * functional.kl_div(q.log(), m)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
def test_the_official_form_is_what_the_authors_code_returns():
    model, teacher = (item.double() for item in logits())
    found = zero_retrain_forgetting(model, teacher, form="official").mean()
    torch.testing.assert_close(found, authors_zrf(model, teacher), rtol=1e-12, atol=0)
    assert found > zero_retrain_forgetting(model, teacher).mean() + 0.1, "the two forms are far apart"


def test_the_official_form_copes_with_classes_that_both_exclude():
    both = torch.tensor([[0.0, 1.0, -math.inf]])
    assert zero_retrain_forgetting(both, both, form="official").item() == pytest.approx(1.0)
    assert zero_retrain_forgetting(both, torch.zeros(1, 3), form="official").item() == -math.inf


def test_refuses_forms_and_norms_it_does_not_know():
    with pytest.raises(ValueError, match="'l2', 'l1'"):
        activation_distance(*logits(), norm=2)
    with pytest.raises(ValueError, match="'textbook', 'official'"):
        zero_retrain_forgetting(*logits(), form="bits")


@pytest.mark.parametrize("function", [kl_to_reference, js_to_reference, activation_distance, zero_retrain_forgetting])
def test_refuses_other_shapes(function):
    with pytest.raises(ValueError, match=r"here \(2, 3\)"):
        function(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"\(N, C\)"):
        function(torch.zeros(3), torch.zeros(3))
