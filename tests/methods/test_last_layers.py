"""CF-k: what is frozen stays bit for bit, and the rest is trained as in a plain loop over the last layer alone."""

import copy
import math

import pytest
import torch
from lightning import Callback
from torch import nn
from torch.nn import functional

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.methods import CatastrophicForgettingK, FineTune
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from lightning_unlearn.utilities.layers import chosen_layers, frozen_statistics_layers, parameter_layers
from tests.methods.passes import FORGET, Answering, assert_close, run
from tests.modules.cases import Adversarial, loader, same, trainer, weights


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3)


def test_all_layers_are_fine_tuning_bit_for_bit():
    model = Answering(dropout=0.2)
    tuned, _ = run(FineTune(max_steps=6), model)
    assert same(weights(tuned), weights(run(CatastrophicForgettingK(k=3, max_steps=6), model)[0]))
    assert not same(weights(tuned), weights(run(CatastrophicForgettingK(k=2, max_steps=6), model)[0]))


@pytest.mark.parametrize("statistics", ["keep", "update"])
@pytest.mark.parametrize("optimizer", [None, adamw])
def test_frozen_layers_stay_bit_for_bit(optimizer, statistics):
    model = Answering()
    method = CatastrophicForgettingK(max_steps=5, optimizer=optimizer, frozen_statistics=statistics)
    module, _ = run(method, model)
    before, after = model.state_dict(), module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    learnt = {"net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"}
    assert changed == {"net.3.weight", "net.3.bias"} | (learnt if statistics == "update" else set())
    assert all(one.requires_grad for one in module.parameters())
    assert all(layer.training for layer in module.modules())
    assert method._frozen == method._switched_off == method._still == []


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_rest_is_a_plain_loop_over_the_last_layer(clip):
    model = Answering()
    module, seen = run(CatastrophicForgettingK(max_steps=8), model, gradient_clip_val=clip)
    twin = copy.deepcopy(model)
    body, head = twin.net[:3].eval(), twin.net[3]
    optimizer = torch.optim.SGD(head.parameters(), lr=model.hparams.lr / 3, momentum=0.9)
    for batch in seen.batches:
        x, y = batch["retain"]
        optimizer.zero_grad()
        functional.cross_entropy(head(body(x).detach()), y).backward()
        if clip is not None:
            assert math.hypot(*(float(one.grad.norm()) for one in head.parameters())) > clip
            torch.nn.utils.clip_grad_norm_(head.parameters(), clip)
        optimizer.step()
    assert_close(module, twin)


class Gradients(Callback):
    """Which parameters autograd gave a gradient, before anything could drop it, and which asked for one."""

    def __init__(self):
        self.given, self.asked = set(), set()

    def on_after_backward(self, trainer, pl_module):
        parameters = dict(pl_module.named_parameters())
        self.given |= {name for name, one in parameters.items() if one.grad is not None}
        self.asked |= {name for name, one in parameters.items() if one.requires_grad}


@pytest.mark.parametrize(("k", "wanted"), [(1, {"net.3"}), (2, {"net.1", "net.3"}), (3, {"net.0", "net.1", "net.3"})])
def test_frozen_layers_take_no_gradients(k, wanted):
    seen, model = Gradients(), Answering()
    names = {f"{layer}.{kind}" for layer in wanted for kind in ("weight", "bias")}
    wrapped = UnlearningModule(model, CatastrophicForgettingK(k=k, max_steps=2))
    parts = UnlearningDataModule(loader(), FORGET).with_parts(("retain",))
    trainer(max_steps=2, callbacks=[seen]).fit(wrapped, datamodule=parts)
    wrapped.unwrap()
    assert seen.given == seen.asked == names
    assert all(one.requires_grad for one in model.parameters())


def test_what_was_frozen_by_the_user_stays_so_and_an_exception_gives_the_rest_back():
    class Breaks(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("broken")

    model = Answering()
    model.net[0].bias.requires_grad_(False)
    wrapped = UnlearningModule(model, CatastrophicForgettingK(max_steps=3))
    parts = UnlearningDataModule(loader(), FORGET).with_parts(("retain",))
    try:
        with pytest.raises(RuntimeError, match="broken"):
            trainer(max_steps=3, callbacks=[Breaks()]).fit(wrapped, datamodule=parts)
    finally:
        wrapped.unwrap()
    assert [name for name, one in model.named_parameters() if not one.requires_grad] == ["net.0.bias"]


def test_layers_by_name():
    model = Answering()
    by_count, _ = run(CatastrophicForgettingK(k=2, max_steps=4), model)
    by_name, _ = run(CatastrophicForgettingK(layers=["net.[13]"], max_steps=4), model)
    assert same(weights(by_count), weights(by_name))
    first, _ = run(CatastrophicForgettingK(layers=["net.0"], max_steps=4), model)
    assert not torch.equal(first.net[0].weight, model.net[0].weight)
    assert torch.equal(first.net[3].weight, model.net[3].weight)


@pytest.mark.parametrize(("settings", "match"), [({"k": 4}, "k"), ({"layers": ["net.9"]}, "layers")])
def test_layers_that_are_not_there(settings, match):
    model = Answering()
    before = weights(model)
    with pytest.raises(ValueError, match=f"`{match}`"):
        run(CatastrophicForgettingK(max_steps=2, **settings), model)
    assert same(before, weights(model))
    with pytest.raises(ValueError, match="`k`"):
        CatastrophicForgettingK(k=0)


def test_manual_optimization_is_frozen_as_well():
    model = Adversarial()
    module, _ = run(CatastrophicForgettingK(layers=["generator"], max_steps=6), model)
    assert same(weights(model.critic), weights(module.critic))
    assert not same(weights(model.generator), weights(module.generator))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
        self.fixed = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embedding.weight


def test_which_layers_there_are():
    net = Tied()
    assert list(parameter_layers(net)) == ["embedding", "body.0", "head"]
    assert list(chosen_layers(net, 2)) == ["body.0", "head"]
    assert list(chosen_layers(net, 1, ["body", "h*"])) == ["body.0", "head"]
    frozen = frozen_statistics_layers(net, chosen_layers(net, 2))
    assert len(frozen) == 1
    assert frozen[0] is net.norm
    frozen = frozen_statistics_layers(net, chosen_layers(net, 1, ["embedding"]))
    assert len(frozen) == 1
    assert frozen[0] is net.body[1]
    with pytest.raises(ValueError, match="layers"):
        chosen_layers(net, 1, [])
