"""An optimizer's step as a map: torch's own optimizers and automatic differentiation are the references."""

import pytest
import torch
from torch.autograd.functional import jvp

from lightning_unlearn.functional.optimizer_maps import AdamMap, MapState, SGDMap

SGD = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.5, "maximize": True, "weight_decay": 0.1},
]
ADAM = [{}, {"weight_decay": 0.1}, {"betas": (0.5, 0.7), "eps": 1e-3, "maximize": True}]
N = 5


def gradients(steps=6):
    return torch.randn(steps, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def start():
    return torch.linspace(-1, 1, N, dtype=torch.float64)


def cases():
    for settings in SGD:
        yield torch.optim.SGD, settings, SGDMap(lr=0.1, **settings)
    for optimizer in (torch.optim.Adam, torch.optim.AdamW):
        for settings in ADAM:
            mine = {key: value for key, value in settings.items() if key != "betas"}
            beta1, beta2 = settings.get("betas", (0.9, 0.999))
            decay = {"weight_decay": 0.0, **mine}
            yield (
                optimizer,
                {"weight_decay": 0.0, **settings},
                AdamMap(0.1, beta1, beta2, decoupled=optimizer is torch.optim.AdamW, **decay),
            )


NAMES = [f"{optimizer.__name__}-{number}" for number, (optimizer, _, _) in enumerate(cases())]


@pytest.mark.parametrize(("optimizer", "settings", "rule"), list(cases()), ids=NAMES)
def test_steps_are_those_of_torch(optimizer, settings, rule):
    theirs = start().requires_grad_()
    stepped = optimizer([theirs], lr=0.1, **settings)
    weights, state = start(), rule.begin(start())
    for gradient in gradients():
        theirs.grad = gradient.clone()
        stepped.step()
        weights, state = rule.step(weights, state, gradient)
        torch.testing.assert_close(weights, theirs.detach(), rtol=1e-13, atol=1e-14)
    assert state.count == 6


@pytest.mark.parametrize(("optimizer", "settings", "rule"), list(cases()), ids=NAMES)
def test_the_derivative_is_that_of_automatic_differentiation(optimizer, settings, rule):
    weights, state = start(), rule.begin(start())
    generator = torch.Generator().manual_seed(7)
    for gradient in gradients(3):
        changes = [torch.randn(N, generator=generator, dtype=torch.float64) for _ in range(2 + rule.n_moments)]
        count = state.count

        def step(w, g, *moments, count=count):
            new, after = rule.step(w, MapState(count, moments), g)
            return (new, *after.moments)

        if not state.count:  # before the first step they are zeros, not arguments
            changes[2:] = [torch.zeros(N, dtype=torch.float64) for _ in changes[2:]]
        _, expected = jvp(step, (weights, gradient, *state.moments), tuple(changes))
        found, moments = rule.tangent(weights, state, gradient, changes[0], tuple(changes[2:]), changes[1])
        for one, other in zip((found, *moments), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        weights, state = rule.step(weights, state, gradient)


@pytest.mark.parametrize("settings", SGD)
def test_a_change_tells_its_gradient(settings):
    rule = SGDMap(lr=torch.linspace(0.1, 0.5, N, dtype=torch.float64), **settings)
    weights, state = start(), rule.begin(start())
    for gradient in gradients():
        new, after = rule.step(weights, state, gradient)
        torch.testing.assert_close(rule.gradient_of(weights, state, new - weights), gradient, rtol=1e-10, atol=1e-12)
        weights, state = new, after


def test_without_a_rate_a_change_tells_nothing():
    rule = SGDMap(lr=0.0)
    with pytest.raises(ValueError, match="can be told"):
        rule.gradient_of(start(), rule.begin(start()), torch.zeros(N))
    rule = SGDMap(lr=torch.tensor([0.1, 0.0]))
    with pytest.raises(ValueError, match="can be told"):
        rule.gradient_of(torch.ones(2), rule.begin(torch.ones(2)), torch.zeros(2))


def test_an_entry_that_never_had_a_gradient_is_moved_by_decay_alone():
    rule = AdamMap(0.1, weight_decay=0.5, decoupled=True)
    weights, gradient = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    change = torch.tensor([0.3, 0.3], dtype=torch.float64)
    zeros = torch.zeros(2, dtype=torch.float64)
    found, _ = rule.tangent(weights, rule.begin(weights), gradient, change, (zeros, zeros), change)
    assert torch.isfinite(found).all()
    assert float(found[0]) == pytest.approx(0.3 * (1 - 0.1 * 0.5), rel=1e-15)
    # The first Adam step is a sign: it does not depend on how large the gradient is, beyond eps.
    assert float(found[1]) == pytest.approx(0.3 * (1 - 0.1 * 0.5), rel=1e-6)
