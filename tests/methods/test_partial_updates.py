"""Masks of single steps, and what a real Trainer with momentum, Adam and decay does under them."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from lightning import Callback, seed_everything
from torch import nn

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.methods import FineTune, GradientAscent, NegGradPlus, PartialUpdates
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from tests.modules.cases import User, loader, same, trainer, weights

OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3),
}


class Snapshots(Callback):
    """Weights before the first and after every step."""

    def __init__(self):
        self.seen = []

    def keep(self, module):
        self.seen.append({name: one.detach().clone() for name, one in module.named_parameters()})

    def on_train_start(self, trainer, pl_module):
        self.keep(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.keep(pl_module)


def run(method, steps=None, **settings):
    seed_everything(3, verbose=False)
    model, snapshots = User(norm=False), Snapshots()
    wrapped = UnlearningModule(model, method)
    data = UnlearningDataModule(loader(), range(0, 40, 3), seed=5).with_parts(method.parts)
    trainer(max_steps=method.max_steps, callbacks=[snapshots], **settings).fit(wrapped, datamodule=data)
    wrapped.unwrap()
    return model, snapshots.seen


def parameter(n, seed=0):
    made = nn.Parameter(torch.zeros(n))
    made.grad = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return made


@pytest.mark.parametrize("mask", ["magnitude", "random", "cyclic", "fixed"])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5])
def test_exactly_the_share_of_every_layer(mask, fraction):
    layers = [("a", parameter(7)), ("b", parameter(100)), ("c", nn.Parameter(torch.zeros(5)))]
    for iteration in range(5):
        masks = PartialUpdates(fraction, mask).masks(layers, iteration)
        assert [int(masks[one].sum()) for _, one in layers[:2]] == [math.ceil(fraction * 7), math.ceil(fraction * 100)]
        assert layers[2][1] not in masks  # no gradient


def test_what_each_policy_promises():
    layers = [("w", parameter(20))]
    one = layers[0][1]
    kept = PartialUpdates(0.25).masks(layers, 0)[one]
    assert float(one.grad[kept].abs().min()) > float(one.grad[~kept].abs().max())
    cyclic = [PartialUpdates(0.25, "cyclic").masks(layers, step)[one] for step in range(5)]
    assert torch.stack(cyclic[:4]).sum(0).eq(1).all()
    assert torch.equal(cyclic[4], cyclic[0])
    fixed = [PartialUpdates(0.25, "fixed", seed=2).masks(layers, step)[one] for step in range(3)]
    assert all(torch.equal(a, b) for a, b in pairwise(fixed))
    drawn = [PartialUpdates(0.25, "random", seed=2).masks(layers, step)[one] for step in range(40)]
    assert len({tuple(mask.tolist()) for mask in drawn}) > 30
    assert torch.stack(drawn).sum(0).float().mean() == pytest.approx(10)
    overridden = PartialUpdates(0.25, overrides={"w*": 1.0}).masks(layers, 0)
    assert overridden == {}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mask", ["magnitude", "random", "cyclic", "fixed"])
def test_no_step_moves_more_than_its_share_whatever_the_optimizer_remembers(optimizer, mask):
    method = GradientAscent(max_steps=6, optimizer=OPTIMIZERS[optimizer], stop=None)
    _, seen = run(method.with_updates(PartialUpdates(0.2, mask)))
    moved_ever = {}
    for before, after in pairwise(seen):
        for name, value in after.items():
            moved = value != before[name]
            assert 0 < int(moved.sum()) <= math.ceil(0.2 * value.numel()), name
            moved_ever[name] = moved_ever.get(name, torch.zeros_like(moved)) | moved
    if mask == "fixed":
        assert all(int(moved.sum()) == math.ceil(0.2 * moved.numel()) for moved in moved_ever.values())
    else:
        assert any(int(moved.sum()) > math.ceil(0.2 * moved.numel()) for moved in moved_ever.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", [GradientAscent, NegGradPlus, FineTune])
def test_a_whole_share_is_the_naive_method_bit_for_bit(optimizer, method):
    settings = {"max_steps": 5, "optimizer": OPTIMIZERS[optimizer]} | ({} if method is FineTune else {"stop": None})
    naive, _ = run(method(**settings))
    partial, _ = run(method(**settings).with_updates(PartialUpdates(1.0)))
    masked, _ = run(method(**settings).with_updates(PartialUpdates(0.5)))
    assert same(weights(naive), weights(partial))
    assert not same(weights(naive), weights(masked))


def test_the_first_step_of_plain_sgd_against_a_loop():
    method = GradientAscent(max_steps=1, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1), stop=None)
    _, (before, naive) = run(method)
    _, (_, partial) = run(method.with_updates(PartialUpdates(0.3)))
    for name, start in before.items():
        change = (naive[name] - start).flatten()
        order = sorted(range(change.numel()), key=lambda place, change=change: -abs(float(change[place])))
        wanted = start.clone().flatten()
        for place in order[: math.ceil(0.3 * change.numel())]:
            wanted[place] = naive[name].flatten()[place]
        assert torch.equal(partial[name].flatten(), wanted)


def test_accumulated_batches_are_one_step_and_clipping_is_part_of_it():
    method = GradientAscent(max_steps=3, stop=None).with_updates(PartialUpdates(0.2, "cyclic"))
    _, seen = run(method, accumulate_grad_batches=2, gradient_clip_val=0.01)
    distinct = [one for index, one in enumerate(seen) if index == 0 or not same(one, seen[index - 1])]
    assert len(distinct) == 4
    for before, after in pairwise(distinct):
        assert all(
            int((after[name] != before[name]).sum()) <= math.ceil(0.2 * one.numel()) for name, one in after.items()
        )


def test_a_copy_is_restricted_and_the_method_stays(tmp_path):
    method = GradientAscent(max_steps=1)
    partial = method.with_updates(PartialUpdates(0.1))
    assert method.updates is None
    assert "PartialUpdates(fraction=0.1" in repr(partial)
    assert copy.copy(partial).with_updates(None).updates is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.5}, "fraction"),
        ({"mask": "largest"}, "mask"),
        ({"seed": -1}, "seed"),
        ({"overrides": {"w": 2}}, r"overrides\['w'\]"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        PartialUpdates(**settings)
