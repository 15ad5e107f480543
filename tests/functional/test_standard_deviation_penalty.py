"""The standard-deviation penalty against its formula written out, finite differences, and the authors' own unit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.functional.standard_deviation_penalty import convert_gamma, standard_deviation_penalty


def paper_form(logits, gamma):
    """The formula, sample by sample, in float64."""
    rows = np.asarray(logits, dtype=np.float64)
    return gamma * np.mean([np.sqrt(np.mean((row - row.mean()) ** 2)) for row in rows])


def code_form(logits, gamma):
    """`std_reg * sum(std(z)) / (N * C)` with the unbiased deviation, as the authors' files have it."""
    rows = np.asarray(logits, dtype=np.float64)
    return gamma * rows.std(axis=1, ddof=1).sum() / rows.size


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_both_forms_are_the_formulas_written_out(classes):
    logits = random(7, classes) * 3
    assert standard_deviation_penalty(logits, 1.7).item() == pytest.approx(paper_form(logits, 1.7), rel=1e-12)
    assert standard_deviation_penalty(logits, 20.0, form="code").item() == pytest.approx(
        code_form(logits, 20.0), rel=1e-12
    )


@settings(deadline=None, max_examples=50)
@given(classes=st.integers(2, 200), gamma=st.floats(1e-3, 1e3))
def test_the_conversion_is_exact_both_ways(classes, gamma):
    logits = random(4, classes)
    there = convert_gamma(gamma, classes, source="code", target="paper")
    assert convert_gamma(there, classes, source="paper", target="code") == pytest.approx(gamma, rel=1e-14)
    assert standard_deviation_penalty(logits, there).item() == pytest.approx(code_form(logits, gamma), rel=1e-10)


def test_the_gammas_that_the_code_was_run_with():
    assert convert_gamma(1.0, 10, source="code", target="paper") == pytest.approx(0.1054, abs=5e-5)
    assert convert_gamma(1.0, 100, source="code", target="paper") == pytest.approx(0.01005, abs=5e-6)
    assert convert_gamma(1.0, 2, source="code", target="paper") == pytest.approx(0.7071, abs=5e-5)


def test_gradients_are_those_of_the_function_twice():
    logits = random(3, 4).requires_grad_()
    for form in ("paper", "code"):
        assert torch.autograd.gradcheck(lambda z, f=form: standard_deviation_penalty(z, 2.0, form=f), logits)
        assert torch.autograd.gradgradcheck(lambda z, f=form: standard_deviation_penalty(z, 2.0, form=f), logits)


def test_the_gradient_is_the_formula():
    logits = random(5, 10).requires_grad_()
    standard_deviation_penalty(logits, 0.5).backward()
    z = logits.detach()
    centred = z - z.mean(1, keepdim=True)
    by_hand = 0.5 * centred / (10 * centred.square().mean(1, keepdim=True).sqrt()) / 5
    torch.testing.assert_close(logits.grad, by_hand, rtol=1e-10, atol=0)


def test_equal_logits_have_gradient_zero():
    logits = torch.zeros(4, 10, requires_grad=True)
    standard_deviation_penalty(logits).backward()
    assert torch.equal(logits.grad, torch.zeros(4, 10))


def test_a_constant_for_each_sample_changes_nothing():
    logits = random(6, 5)
    shifted = logits + random(6, 1, seed=1) * 100
    torch.testing.assert_close(standard_deviation_penalty(shifted), standard_deviation_penalty(logits))
    log_probabilities = logits.log_softmax(1)
    torch.testing.assert_close(standard_deviation_penalty(log_probabilities), standard_deviation_penalty(logits))


def test_positions_and_classes_in_another_dimension():
    logits = random(2, 3, 4, 5)
    rows = logits.permute(0, 2, 3, 1).reshape(-1, 3)
    assert standard_deviation_penalty(logits).item() == pytest.approx(paper_form(rows, 1.0), rel=1e-12)
    last = logits.permute(0, 2, 3, 1)
    torch.testing.assert_close(standard_deviation_penalty(last, class_dim=-1), standard_deviation_penalty(logits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = (random(64, 10) * 100).to(dtype).requires_grad_()
    value = standard_deviation_penalty(logits)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(paper_form(logits.detach().double(), 1.0), rel=1e-5)
    value.backward()
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(3)}, r"`logits` .*\(N, C, ...\)"),
        ({"logits": torch.zeros(3, 2, dtype=torch.long)}, "floating-point"),
        ({"logits": torch.zeros(3, 1)}, "`n_classes` .*WeightChangePenalty"),
        ({"logits": torch.zeros(3, 2), "gamma": -1.0}, "`gamma`"),
        ({"logits": torch.zeros(3, 2), "form": "both"}, "'paper', 'code'"),
        ({"logits": torch.zeros(3, 2), "class_dim": 2}, "`class_dim`"),
        ({"logits": torch.zeros(3, 2), "eps": 0.0}, "`eps`"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        standard_deviation_penalty(**arguments)
