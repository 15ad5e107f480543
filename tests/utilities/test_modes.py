import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_unlearn.utilities.modes import (
    evaluating,
    isolated_rng,
    preserved_buffers,
    preserved_modes,
    preserved_requires_grad,
)


class BrokenError(Exception):
    pass


def mixed():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    net[1].eval()
    net[2][0].eval()
    net[0].weight.requires_grad_(False)
    return net


def modes(net):
    return [module.training for module in net.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_given_back_also_after_an_exception(fails):
    net = mixed()
    before = (
        modes(net),
        [p.requires_grad for p in net.parameters()],
        {k: v.clone() for k, v in net.state_dict().items()},
    )
    try:
        with preserved_modes(net), preserved_requires_grad(net), preserved_buffers(net):
            net.train().requires_grad_(True)
            net(torch.randn(5, 2))
            assert int(net[1].num_batches_tracked) == 1
            if fails:
                raise BrokenError
    except BrokenError:
        assert fails
    assert (modes(net), [p.requires_grad for p in net.parameters()]) == before[:2]
    assert all(torch.equal(value, before[2][name]) for name, value in net.state_dict().items())


def test_evaluating_is_eval_inside():
    net = mixed()
    before = modes(net)
    with evaluating(net):
        assert not any(modes(net))
    assert modes(net) == before


@pytest.mark.parametrize("fails", [False, True])
def test_random_states_are_given_back(fails):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    try:
        with isolated_rng(seed=3):
            inside = draw()
            if fails:
                raise BrokenError
    except BrokenError:
        assert fails
    assert inside[2] != expected[2]
    assert draw() == expected


def test_a_seed_makes_the_inside_repeatable():
    drawn = []
    for _ in range(2):
        with isolated_rng(seed=3):
            drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


class Adapted(nn.Linear):
    """Merges its weights in eval mode, as adapters do."""

    def __init__(self):
        super().__init__(2, 2)
        self.merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_what_a_users_train_does_in_eval_mode_is_undone():
    net = nn.Sequential(Adapted(), nn.Sequential(Adapted(), nn.BatchNorm1d(2)))
    net[1].eval()
    before = modes(net)
    with evaluating(net):
        assert net[0].merged
    assert (net[0].merged, net[1][0].merged) == (False, True)
    assert modes(net) == before


def test_a_buffer_is_given_back_where_a_layer_assigns_a_new_tensor():
    net = nn.Sequential(nn.BatchNorm1d(2))
    before = net[0].running_mean
    with preserved_buffers(net):
        net[0].running_mean = net[0].running_mean + 1
        net[0].register_buffer("late", torch.zeros(1))
    assert net[0].running_mean is before
    assert before.tolist() == [0, 0]
    assert "late" not in net.state_dict()
