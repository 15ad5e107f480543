"""Verification error and weight distance against a written-out numpy norm, and what must be refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_unlearn.functional.weight_distance import verification_error, weight_distance
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


def with_buffers(first, second):
    buffers = [(name, one) for name, one in first.named_buffers() if one.is_floating_point()]
    others = dict(second.named_buffers())
    gaps = [np.linalg.norm(one.numpy().astype(np.float64) - others[name].numpy()) for name, one in buffers]
    return np.sqrt(np.linalg.norm(flat(first) - flat(second)) ** 2 + sum(gap**2 for gap in gaps))


def test_buffers_count_where_they_are_included_and_counters_never():
    first, second = pair()
    second.norm.num_batches_tracked += 7
    expected = with_buffers(first, second)
    assert expected > 2 * verification_error(first, second).item()
    for left, right in (
        (first, second),
        (first, second.state_dict()),
        (first.state_dict(), second),
        ({**dict(first.named_parameters()), **dict(first.named_buffers())}, second),
    ):
        assert verification_error(left, right, buffers="include").item() == pytest.approx(expected, rel=1e-12)
    layers = verification_error(first, second, buffers="include", per_layer=True)
    assert list(layers)[-2:] == ["norm.running_mean", "norm.running_var"]
    # Without a module, nobody knows that a state dict has tied weights twice.
    first.tied, second.tied = nn.Identity(), nn.Identity()
    states = first.state_dict(), second.state_dict()
    assert verification_error(*states, buffers="include").item() == pytest.approx(expected, rel=1e-12)


def test_a_share_of_the_way_includes_the_buffers_of_the_way():
    first, second = pair()
    torch.manual_seed(2)
    start = AwkwardNet()
    found = verification_error(first, second, relative_to=start, buffers="include").item()
    assert found == pytest.approx(with_buffers(first, second) / with_buffers(start, second), rel=1e-12)
    assert verification_error(start, second, relative_to=start.state_dict(), buffers="include") == 1


def test_a_buffer_that_no_checkpoint_holds_is_no_weight():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.load_state_dict(first.state_dict())
    for module, value in ((first, 1.0), (second, 2.0)):
        module.register_buffer("cache", torch.tensor(value), persistent=False)
        module.register_buffer("kept", torch.tensor(value))
    assert verification_error(first, second, buffers="include") == 1
    assert verification_error(first, first.state_dict(), buffers="include") == 0


def test_a_module_says_what_is_a_weight_in_all_the_others():
    first, second = pair()
    torch.manual_seed(2)
    start = AwkwardNet()
    expected = verification_error(first, second, relative_to=start).item()
    for sides in (
        (first, second.state_dict(), start.state_dict()),
        (first.state_dict(), second.state_dict(), start),
        (first.state_dict(), second, start.state_dict()),
    ):
        assert verification_error(*sides[:2], relative_to=sides[2]).item() == pytest.approx(expected, rel=1e-12)


def test_complex_weights_are_measured_in_both_parts():
    left = {"w": torch.tensor([3 + 4j, 1j])}
    assert weight_distance(left, {"w": torch.tensor([0j, 1j])}) == 5


def test_a_distance_is_the_same_from_both_sides_and_adds_up():
    first, second = pair()
    whole = weight_distance(first, second)
    assert whole == verification_error(first, second)
    assert weight_distance(second, first) == whole
    layers = weight_distance(first, second, per_layer=True)
    assert np.sqrt(sum(float(one) ** 2 for one in layers.values())) == pytest.approx(whole.item(), rel=1e-12)
    with pytest.raises(ValueError, match="`right` to be weights with the names of `left`"):
        weight_distance(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match="'ignore', 'include'"):
        weight_distance(first, second, buffers="some")
