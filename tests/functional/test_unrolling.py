"""A change carried along a training: a second training is the reference, in float64."""

import pytest
import torch

from lightning_unlearn.functional.optimizer_maps import AdamMap, SGDMap
from lightning_unlearn.functional.unrolling import UnrolledChange

N, STEPS = 4, 12
RULES = {
    "plain": SGDMap(0.1, weight_decay=0.05),
    "momentum": SGDMap(0.05, momentum=0.9, dampening=0.2, weight_decay=0.05),
    "nesterov": SGDMap(0.05, momentum=0.8, nesterov=True),
    "adam": AdamMap(0.02, 0.8, 0.9, weight_decay=0.05),
    "adamw": AdamMap(0.02, 0.8, 0.9, weight_decay=0.05, decoupled=True),
}


def problem():
    """Symmetric matrices and targets of every step: the gradient is `matrix @ w - target`."""
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(STEPS, N, N, generator=generator, dtype=torch.float64)
    return roots @ roots.transpose(1, 2) / N, torch.randn(STEPS, N, generator=generator, dtype=torch.float64)


def train(rule, gradient, skipped=()):
    weights = torch.linspace(-1, 1, N, dtype=torch.float64)
    state = rule.begin(weights)
    points = []
    for step in range(STEPS):
        points.append((weights, state))
        if step not in skipped:
            weights, state = rule.step(weights, state, gradient(step, weights))
    return weights, state, points


def unrolled(rule, points, final, matrices, targets, changed_matrices, changed_targets, skipped=()):
    change = UnrolledChange(N, rule.n_moments)
    for step, (weights, state) in enumerate(points):
        after = [*points, final][step + 1]
        if step in skipped:
            change.skip(after[0] - weights, state, after[1])
            continue
        gradient = matrices[step] @ weights - targets[step]
        extra = changed_matrices[step] @ (weights + change.weights) - changed_targets[step] - gradient
        change.advance(rule, weights, state, gradient, extra)
    return change


@pytest.mark.parametrize("skipped", [(), (0, 3, 4)], ids=["all steps", "some left out"])
@pytest.mark.parametrize("name", ["plain", "momentum", "nesterov"])
def test_a_quadratic_loss_and_sgd_are_followed_exactly(name, skipped):
    rule, (matrices, targets) = RULES[name], problem()
    changed = matrices * torch.linspace(0.7, 1.1, STEPS, dtype=torch.float64)[:, None, None], targets + 0.5
    *final, points = train(rule, lambda step, w: matrices[step] @ w - targets[step])
    twin, state, _ = train(rule, lambda step, w: changed[0][step] @ w - changed[1][step], skipped)
    change = unrolled(rule, points, tuple(final), matrices, targets, *changed, skipped)
    assert float((twin - final[0]).norm()) > 0.1
    torch.testing.assert_close(final[0] + change.weights, twin, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(final[1].moments[0] + change.moments[0], state.moments[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", sorted(RULES))
def test_it_is_the_derivative_of_the_training(name):
    rule, (matrices, targets) = RULES[name], problem()
    # Only the gradient at the known weights changes, by a share of `push`: what is linear in the share is known.
    push = torch.randn(STEPS, N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def end(share):
        return train(rule, lambda step, w: matrices[step] @ w - targets[step] + share * push[step])[0]

    points = train(rule, lambda step, w: matrices[step] @ w - targets[step])[2]
    change = UnrolledChange(N, rule.n_moments)
    for step, (here, before) in enumerate(points):
        change.advance(
            rule, here, before, matrices[step] @ here - targets[step], matrices[step] @ change.weights + push[step]
        )
    step = 1e-6
    torch.testing.assert_close(change.weights, (end(step) - end(-step)) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_steps_left_out_under_adam_leave_its_bias_corrections_behind(name):
    rule, (matrices, targets) = RULES[name], problem()
    points = train(rule, lambda step, w: matrices[step] @ w - targets[step])[2]
    change = UnrolledChange(N, 2)
    # The first step is left out and nothing else: one step of the twin is from zero moments again.
    change.skip(points[1][0] - points[0][0], points[0][1], points[1][1])
    here, before = points[1]
    assert not change.is_zero
    twin = train(rule, lambda step, w: matrices[step] @ w - targets[step], skipped=(0,))[2][2]
    gradient = matrices[1] @ here - targets[1]
    change.advance(rule, here, before, gradient, matrices[1] @ change.weights)
    exact, first_order = twin[0] - points[2][0], change.weights
    # With the known number of steps instead of its own, the twin would be off by far more than by linearising.
    assert float((first_order - exact).norm()) < 0.5 * float(exact.norm())


def test_what_blows_up_is_seen():
    rule, change = SGDMap(1e200), UnrolledChange(1, 1)
    for _ in range(3):
        change.advance(
            rule, torch.ones(1), rule.begin(torch.ones(1)), torch.ones(1), 1e200 * (1 + change.weights.abs())
        )
    assert not change.is_finite
