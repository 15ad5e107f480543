"""Unlearning error: the formula written out, its forms, and that it orders settings as the true error does."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional

from lightning_unlearn.functional.curvature import hessian_product
from lightning_unlearn.functional.power_iteration import top_curvature
from lightning_unlearn.functional.unlearning_error import unlearning_error, unlearning_error_from_distance
from tests.helpers.models import AwkwardNet

SETTING = {"lr": 0.03, "steps": 7, "singular_value": 4.0}


def trained():
    torch.manual_seed(1)
    start = AwkwardNet()
    end = copy.deepcopy(start)
    with torch.no_grad():
        for parameter in end.parameters():
            parameter += torch.randn_like(parameter)
        end.norm.running_mean += 2
    return end, start


def travelled(end, start, buffers=False):
    pairs = list(zip(end.parameters(), start.parameters(), strict=True))
    if buffers:
        pairs += [(end.norm.running_mean, start.norm.running_mean), (end.norm.running_var, start.norm.running_var)]
    gaps = [(a.detach().numpy().astype(np.float64) - b.detach().numpy().astype(np.float64)) ** 2 for a, b in pairs]
    return math.sqrt(sum(float(gap.sum()) for gap in gaps))


def test_is_the_published_formula():
    end, start = trained()
    t, eta, sigma = SETTING["steps"], SETTING["lr"], SETTING["singular_value"]
    # As the paper sums it: step i adds i times the mean step, for i = 1 .. t - 1.
    published = eta**2 * sigma * travelled(end, start) / t * sum(range(1, t))
    assert unlearning_error(end, start, **SETTING).item() == pytest.approx(published, rel=1e-12)
    assert unlearning_error(end, start.state_dict(), **SETTING).item() == pytest.approx(published, rel=1e-12)
    assert unlearning_error_from_distance(travelled(end, start), **SETTING) == pytest.approx(published, rel=1e-12)


def test_one_step_and_no_curvature_leave_no_error():
    end, start = trained()
    assert unlearning_error(end, start, lr=0.1, steps=1, singular_value=3.0) == 0
    assert unlearning_error(end, start, lr=0.1, steps=9, singular_value=0.0) == 0
    assert unlearning_error(start, start, **SETTING) == 0


def test_a_distance_may_be_a_tensor_and_keeps_its_form():
    distances = torch.tensor([1.0, 2.0])
    factor = 0.03**2 * 4.0 * 3
    torch.testing.assert_close(unlearning_error_from_distance(distances, **SETTING), distances * factor)
    assert isinstance(unlearning_error_from_distance(1.0, **SETTING), float)


@pytest.mark.parametrize("buffers", ["ignore", "include"])
def test_layers_add_up_and_the_relative_form_is_a_share_of_the_way(buffers):
    end, start = trained()
    way = travelled(end, start, buffers == "include")
    total = unlearning_error(end, start, buffers=buffers, **SETTING).item()
    relative = unlearning_error(end, start, buffers=buffers, relative=True, **SETTING).item()
    assert total == pytest.approx(0.03**2 * 4.0 * 3 * way, rel=1e-12)
    assert relative == pytest.approx(total / way, rel=1e-12)
    for value, share in ((total, False), (relative, True)):
        layers = unlearning_error(end, start, buffers=buffers, relative=share, per_layer=True, **SETTING)
        assert math.sqrt(sum(float(one) ** 2 for one in layers.values())) == pytest.approx(value, rel=1e-12)
        assert ("norm.running_mean" in layers) == (buffers == "include")
    scale = unlearning_error({"w": torch.ones(())}, {"w": torch.zeros(())}, relative=True, **SETTING)
    assert scale.item() == pytest.approx(relative, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lr": 0.0}, "`lr`"),
        ({"steps": 0}, "`steps`"),
        ({"steps": 2.0}, "`steps`"),
        ({"singular_value": -1.0}, "`singular_value`"),
        ({"singular_value": math.nan}, "`singular_value`"),
    ],
)
def test_refuses_numbers_out_of_range(change, match):
    end, start = trained()
    with pytest.raises(ValueError, match=match):
        unlearning_error(end, start, **{**SETTING, **change})
    with pytest.raises(ValueError, match=match):
        unlearning_error_from_distance(1.0, **{**SETTING, **change})


def test_refuses_other_models_and_a_share_of_no_way():
    with pytest.raises(ValueError, match="`initial` to be weights with the names of `weights`"):
        unlearning_error(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), **SETTING)
    end, _ = trained()
    with pytest.raises(ValueError, match="`initial` to be weights other than"):
        unlearning_error(end, copy.deepcopy(end), relative=True, **SETTING)


def test_orders_settings_as_the_true_error_does_and_bounds_nothing():
    """Softmax regression, the first batch forgotten: error of a single-gradient deletion against a retrained model."""
    n_batches, size, features, classes = 20, 32, 20, 5
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(n_batches, size, features)
    y = (x @ normal(features, classes)).argmax(-1)
    start = 0.3 * normal(features, classes)

    def gradient(w, batch):
        return x[batch].T @ ((x[batch] @ w).softmax(1) - functional.one_hot(y[batch], classes)) / size

    def train(lr, epochs, first):
        w = start
        for batch in (batch for _ in range(epochs) for batch in range(first, n_batches)):
            w = w - lr * gradient(w, batch)
        return w

    def curvature(w):
        w = w.clone().requires_grad_()

        def product(vector):
            return hessian_product(functional.cross_entropy(x.flatten(0, 1) @ w, y.flatten()), [w], vector)

        return top_curvature(product, normal(w.numel())).singular_value

    proxies, errors, helped = [], [], []
    for lr in (0.003, 0.01, 0.03, 0.05, 0.1, 0.2):
        for epochs in (1, 2, 3, 5, 8):
            original, retrained = train(lr, epochs, 0), train(lr, epochs, 1)
            deleted = original + epochs * lr * gradient(start, 0)
            sides = {"w": original}, {"w": start}
            setting = {"lr": lr, "steps": epochs * n_batches, "singular_value": curvature(original)}
            proxies.append(unlearning_error(*sides, **setting).item())
            errors.append(float((deleted - retrained).norm()))
            helped.append(errors[-1] < float((original - retrained).norm()))
    ratios = [error / proxy for error, proxy in zip(errors, proxies, strict=True)]
    assert spearmanr(proxies, errors).statistic > 0.97
    assert min(ratios) < 0.5
    assert 20 < max(ratios) < 40
    assert all(good for good, proxy in zip(helped, proxies, strict=True) if proxy < 0.05)
    assert not all(helped)
