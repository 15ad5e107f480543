"""The partial forms by name: the naive ones at a whole share, and never more than the share in a step."""

import math
from itertools import pairwise

import pytest
import torch

from lightning_unlearn.methods import (
    GradientAscent,
    LabelFlipping,
    PartialGradientAscent,
    PartialLabelFlipping,
    PartialUpdates,
)
from tests.methods.passes import run
from tests.modules.cases import same, weights

FORMS = [(PartialLabelFlipping, LabelFlipping), (PartialGradientAscent, GradientAscent)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3)


@pytest.mark.parametrize("optimizer", [None, sgd, adamw])
@pytest.mark.parametrize(("partial", "naive"), FORMS)
def test_a_whole_share_is_the_naive_form_bit_for_bit(partial, naive, optimizer):
    settings = {"max_steps": 5, "optimizer": optimizer}
    wanted, _ = run(naive(**settings))
    assert same(weights(wanted), weights(run(partial(fraction=1.0, **settings))[0]))
    restricted, _ = run(partial(fraction=0.5, **settings))
    assert not same(weights(wanted), weights(restricted))
    by_wrapper, _ = run(naive(**settings).with_updates(PartialUpdates(0.5)))
    assert same(weights(restricted), weights(by_wrapper))


@pytest.mark.parametrize("mask", ["magnitude", "random", "cyclic", "fixed"])
@pytest.mark.parametrize(("partial", "naive"), FORMS)
def test_a_step_moves_its_share_and_no_more(partial, naive, mask):
    _, seen = run(partial(fraction=0.2, mask=mask, mask_seed=4, max_steps=5, optimizer=adamw))
    ever = {}
    for before, after in pairwise(seen.weights):
        for name, one in after.items():
            moved = one != before[name]
            assert 0 < int(moved.sum()) <= math.ceil(0.2 * one.numel()), name
            ever[name] = ever.get(name, torch.zeros_like(moved)) | moved
    most = max(float(moved.float().mean()) for moved in ever.values() if moved.numel() > 20)
    assert most > 0.3 or mask == "fixed"
    if mask == "fixed":
        assert all(int(moved.sum()) <= math.ceil(0.2 * moved.numel()) for moved in ever.values())


@pytest.mark.parametrize(("partial", "naive"), FORMS)
def test_settings_are_those_of_both(partial, naive):
    method = partial(fraction=0.3, mask="random", mask_seed=2, lr_scale=0.7)
    assert method.updates == PartialUpdates(0.3, "random", seed=2)
    assert method.lr_scale == 0.7
    assert {**method.settings, "updates": None, "lr_scale": 0} == {
        **naive().settings,
        "updates": None,
        "lr_scale": 0,
    }
    assert "fraction=0.3" in repr(method)
    with pytest.raises(ValueError, match="fraction"):
        partial(fraction=0.0)
