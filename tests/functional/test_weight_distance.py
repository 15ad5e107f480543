"""Verification error against a written-out numpy norm, and what must be refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_unlearn.functional.weight_distance import verification_error
from tests.helpers.models import AwkwardNet


def pair():
    torch.manual_seed(1)
    first = AwkwardNet()
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter += torch.randn_like(parameter)
        second.norm.running_mean += 100
    return first, second


def flat(module):
    return np.concatenate([p.detach().numpy().astype(np.float64).ravel() for p in module.parameters()])


def test_is_the_norm_over_all_parameters_and_no_buffer():
    first, second = pair()
    expected = np.linalg.norm(flat(first) - flat(second))
    assert verification_error(first, second).item() == pytest.approx(expected, rel=1e-12)
    assert verification_error(first, first).item() == 0


def test_frozen_parameters_and_a_model_frozen_for_inference_are_measured():
    first, second = pair()
    whole = verification_error(first, second)
    first.requires_grad_(False)
    second.requires_grad_(False)
    assert verification_error(first, second) == whole


def test_modules_mappings_and_state_dicts_agree():
    first, second = pair()
    whole = verification_error(first, second)
    assert verification_error(first, second.state_dict()) == whole
    assert verification_error(first.state_dict(), second) == whole
    assert verification_error(dict(first.named_parameters()), dict(second.named_parameters())) == whole


def test_pairs_by_name_whatever_the_order():
    first, second = pair()
    shuffled = dict(reversed(list(second.named_parameters())))
    assert verification_error(first, shuffled).item() == pytest.approx(
        verification_error(first, second).item(), rel=1e-14
    )


def test_layers_add_up_to_the_total_with_and_without_a_scale():
    first, second = pair()
    torch.manual_seed(2)
    start = AwkwardNet()
    for relative_to in (None, start):
        layers = verification_error(first, second, relative_to=relative_to, per_layer=True)
        assert list(layers) == [name for name, _ in first.named_parameters()]
        total = np.sqrt(sum(value.item() ** 2 for value in layers.values()))
        assert total == pytest.approx(verification_error(first, second, relative_to=relative_to).item(), rel=1e-12)
    travel = np.linalg.norm(flat(second) - flat(start))
    expected = np.linalg.norm(flat(first) - flat(second)) / travel
    assert verification_error(first, second, relative_to=start).item() == pytest.approx(expected, rel=1e-12)
    assert verification_error(start, second, relative_to=start).item() == pytest.approx(1.0, rel=1e-12)


def test_accumulates_in_float64():
    count = 4_000_000
    left = {"w": torch.full((count,), 1e-4)}
    right = {"w": torch.zeros(count)}
    step = float(np.float32(1e-4))
    assert verification_error(left, right).item() == pytest.approx(step * np.sqrt(count), rel=1e-12)


def test_half_precision_weights_are_compared_without_rounding():
    left = {"w": torch.tensor([1000.0, 1.0], dtype=torch.float16)}
    right = {"w": torch.tensor([999.5, 1.0], dtype=torch.float16)}
    assert verification_error(left, right).item() == 0.5


@pytest.mark.parametrize(
    ("left", "right", "match"),
    [
        (nn.Linear(2, 2), nn.Linear(2, 2, bias=False), "names of `unlearned`"),
        (nn.Linear(2, 2), nn.Linear(2, 3), r"shapes of `unlearned` \(weight: \(2, 2\)\)"),
        (nn.BatchNorm1d(2).state_dict(), nn.BatchNorm1d(2).state_dict(), "num_batches_tracked"),
        (nn.ReLU(), nn.ReLU(), "at least one parameter"),
    ],
)
def test_refuses_what_cannot_be_compared(left, right, match):
    with pytest.raises(ValueError, match=match):
        verification_error(left, right)


def test_refuses_a_reference_that_did_not_move():
    first, second = pair()
    with pytest.raises(ValueError, match="relative_to"):
        verification_error(first, second, relative_to=copy.deepcopy(second))


def test_leaves_no_graph():
    first, second = pair()
    assert not verification_error(first, second).requires_grad
