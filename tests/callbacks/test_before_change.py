"""When weights are looked at: after the closure, before the optimizer; compared with what the optimizer itself does."""

import pytest
import torch
from torch import nn

from lightning_unlearn.callbacks.before_change import look_before_change


class Ascends(torch.optim.Optimizer):
    """Goes uphill before it calls the closure, as sharpness-aware minimisation does."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        (group,) = self.param_groups
        for parameter in group["params"]:
            parameter.add_(0.5)
        with torch.enable_grad():
            closure()
        for parameter in group["params"]:
            parameter.sub_(group["lr"] * parameter.grad)


class AsksTwice(torch.optim.Optimizer):
    """Takes the mean of two gradients at the same weights, of which noisy layers give different ones."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
            closure()
        (group,) = self.param_groups
        for parameter in group["params"]:
            parameter.sub_(group["lr"] * parameter.grad)


def run(optimizer_class, *, call, edit=lambda weight: None, **kwargs):
    """Values of the weight whenever it was looked at, and how often the closure ran."""
    weight = nn.Parameter(torch.full((3,), 2.0))
    optimizer = optimizer_class([weight], **kwargs)
    looks, calls = [], []

    def closure():
        calls.append(weight.detach().clone())
        edit(weight)
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    optimizer.register_step_pre_hook(
        lambda inner, args, kwargs: look_before_change(
            inner, args, kwargs, lambda: looks.append(weight.detach().clone().tolist())
        )
    )
    call(optimizer, closure)
    return looks, len(calls), weight.detach()


def edit(weight):
    weight.data.mul_(3.0)


@pytest.mark.parametrize(
    "call", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)], ids=["positional", "by name"]
)
def test_what_the_closure_does_is_seen_and_what_the_optimizer_does_is_not(call):
    looks, calls, weight = run(torch.optim.SGD, call=call, edit=edit, lr=0.1)
    assert (looks, calls) == ([[6.0] * 3], 1)
    assert torch.allclose(weight, torch.full((3,), 6.0 - 0.1 * 12.0))


@pytest.mark.parametrize("call", [lambda o, c: (c(), o.step()), lambda o, c: (c(), o.step(None))])
def test_without_a_closure_at_once(call):
    looks, _, _ = run(torch.optim.SGD, call=call, edit=edit, lr=0.1)
    assert looks == [[6.0] * 3]


def test_of_several_calls_only_the_first_is_not_the_optimizers_own():
    looks, calls, _ = run(torch.optim.LBFGS, call=lambda o, c: o.step(c), lr=0.1, max_iter=4)
    assert calls > 2
    assert looks == [[2.0] * 3]


def test_a_closure_that_is_called_twice_is_looked_behind_once():
    """A second look would find nothing changed since the first, and forget what that had found."""
    looks, calls, _ = run(AsksTwice, call=lambda o, c: o.step(c), lr=0.1)
    assert (looks, calls) == ([[2.0] * 3], 2)


def test_an_optimizer_that_moves_first_is_not_taken_for_somebody_else():
    looks, calls, weight = run(Ascends, call=lambda o, c: o.step(c), lr=0.1)
    assert (looks, calls) == ([], 1)
    assert torch.allclose(weight, torch.full((3,), 2.5 - 0.1 * 5.0))


def test_the_error_of_a_closure_is_its_own():
    def fails(weight):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(torch.optim.SGD, call=lambda o, c: o.step(c), edit=fails, lr=0.1)
