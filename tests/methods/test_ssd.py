"""Dampening against a loop over entries, from gradients of single batches."""

import math

import pytest
import torch

from lightning_unlearn.methods import SelectiveSynapticDampening
from tests.methods.edits import FORGET, ROWS, Softmax, edit_of, flat, kept, rows, split


def batches(positions, size):
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def importances(module, positions, size, label_free):
    """Sum over batches, and their number, by plain autograd."""
    total, chunks = 0.0, batches(positions, size)
    for chunk in chunks:
        x, y = rows(chunk)
        loss = (module(x) ** 2).sum(1).mean() if label_free else module.training_step((x, y), 0)
        slope = torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(module.net.parameters()))])
        total = total + (slope.abs() if label_free else slope**2)
    return total, len(chunks)


def by_hand(module, size, alpha, strength, label_free):
    forget, n_forget = importances(module, FORGET, size, label_free)
    retain, n_retain = importances(module, kept(), size, label_free)
    own, whole = (forget / n_forget).tolist(), ((forget + retain) / (n_forget + n_retain)).tolist()
    weights = torch.cat([one.detach().flatten() for one in module.net.parameters()]).tolist()
    return [
        weight * min(strength * d / f, 1.0) if f > alpha * d else weight
        for weight, f, d in zip(weights, own, whole, strict=True)
    ]


def after(module, change):
    return torch.cat([one.detach().flatten() for one in module.net.parameters()]) + flat(change)


@pytest.mark.parametrize("label_free", [False, True])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.parametrize(("alpha", "strength"), [(0.7, 1.0), (1.3, 0.2), (0.0, 3.0)])
def test_against_a_loop(label_free, batch_size, alpha, strength):
    module = Softmax(hidden=3)
    method = SelectiveSynapticDampening(alpha=alpha, lambda_=strength, label_free=label_free)
    found = after(module, edit_of(method, module, split(batch_size)))
    wanted = torch.tensor(by_hand(module, batch_size, alpha, strength, label_free), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    before = torch.cat([one.detach().flatten() for one in module.net.parameters()])
    assert bool((found.abs() <= before.abs() * (1 + 1e-12)).all())
    if strength == 0.2:
        assert not torch.allclose(found, before)


def test_limits():
    module = Softmax(hidden=3)
    assert not flat(edit_of(SelectiveSynapticDampening(alpha=1e9), module)).any()
    gone = edit_of(SelectiveSynapticDampening(alpha=0.0, lambda_=0.0), module)
    torch.testing.assert_close(after(module, gone), torch.zeros(flat(gone).numel(), dtype=torch.float64))
    assert list(gone) == [f"net.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]


def test_batches_matter_as_the_card_says():
    module = Softmax(hidden=3)
    method = SelectiveSynapticDampening(alpha=1.3)
    one, many = (flat(edit_of(method, module, split(size))) for size in (1, 8))
    assert not torch.allclose(one, many)


def test_weights_that_matter_to_nothing_stay():
    module = Softmax(hidden=3)
    with torch.no_grad():
        module.net[2].weight[:, 1] = 0.0  # a hidden unit that nobody hears has no gradient on its way in
    change = edit_of(SelectiveSynapticDampening(alpha=0.0), module)
    assert not change["net.0.weight"][1].any()
    assert torch.isfinite(flat(change)).all()


@pytest.mark.parametrize("share", [None, 0.1, 0.5])
def test_a_share_dampens_as_many_weights_as_it_says(share):
    module = Softmax(hidden=3)
    change = flat(edit_of(SelectiveSynapticDampening(share=share, lambda_=0.0), module, split(8)))
    wanted = math.log1p(100 * len(FORGET) / ROWS) / 100 if share is None else share
    assert int((change != 0).sum()) == max(1, int(wanted * change.numel()))


def test_what_is_set_twice():
    with pytest.raises(ValueError, match="share"):
        SelectiveSynapticDampening(alpha=10.0, share=0.1)


@pytest.mark.parametrize("settings", [{"alpha": -1.0}, {"share": 0.0}, {"share": 1.1}, {"lambda_": -0.1}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SelectiveSynapticDampening(**settings)
