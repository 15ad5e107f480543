"""The weight-change penalty against plain autograd on the formula."""

import pytest
import torch

from lightning_unlearn.functional import weight_change_penalty as module
from lightning_unlearn.functional.weight_change_penalty import weight_change_penalty

SHAPES = [(3, 4), (), (5,), (0,), (2, 2, 2), (1,)]


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def explicit(parameters, anchors, strength):
    return strength * sum((one - anchor).pow(2).sum() for one, anchor in zip(parameters, anchors, strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradients_equal_autograd(monkeypatch, chunk, dtype):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    anchors = tensors(1, dtype)
    found, right = ([one.clone().requires_grad_() for one in tensors(0, dtype)] for _ in range(2))
    value, expected = weight_change_penalty(found, anchors, 0.3), explicit(right, anchors, 0.3)
    assert value.dtype == dtype
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
    # The scale that a gradient scaler or accumulation puts before the backward pass.
    (value * 8).backward()
    (expected * 8).backward()
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=tolerance, atol=0)


def test_it_can_be_differentiated_twice():
    anchors = tensors(1, torch.float64)
    parameters = [one.requires_grad_() for one in tensors(0, torch.float64)]

    def penalty(*pieces):
        return weight_change_penalty(pieces, anchors, 0.7)

    assert torch.autograd.gradcheck(penalty, parameters)
    assert torch.autograd.gradgradcheck(penalty, parameters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    weights = torch.full((10_000,), 1.5, dtype=dtype, requires_grad=True)
    value = weight_change_penalty([weights], [torch.ones(10_000, dtype=dtype)], 2.0)
    assert (value.dtype, value.item()) == (torch.float32, 5000.0)
    value.backward()
    assert weights.grad.dtype == dtype
    assert torch.equal(weights.grad, torch.full((10_000,), 2.0, dtype=dtype))


def test_mixed_precisions():
    parameters = [torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.float64, requires_grad=True)]
    value = weight_change_penalty(parameters, [torch.zeros(2), torch.zeros(2, dtype=torch.float64)])
    value.backward()
    assert (value.dtype, value.item()) == (torch.float64, pytest.approx(4.0, rel=1e-6))
    assert [one.grad.dtype for one in parameters] == [torch.float32, torch.float64]


def test_a_parameter_changed_before_the_backward_pass_is_noticed():
    weights = torch.ones(2, requires_grad=True)
    value = weight_change_penalty([weights], [torch.zeros(2)])
    with torch.no_grad():
        weights.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize(
    ("parameters", "anchors", "strength", "message"),
    [
        ([], [], 1.0, "at least one"),
        ([torch.ones(2)], [], 1.0, "one for each of the 1 parameters"),
        ([torch.ones(2)], [torch.ones(3)], 1.0, r"shape \(2,\).*\(3,\)"),
        ([torch.ones(2)], [torch.ones(2)], -1.0, "`strength`"),
        ([torch.ones(2)], [torch.ones(2)], float("nan"), "`strength`"),
    ],
)
def test_bad_input_gets_one_sentence(parameters, anchors, strength, message):
    with pytest.raises(ValueError, match=message):
        weight_change_penalty(parameters, anchors, strength)
