"""Relearn time of models whose steps can be counted by hand, and of trained classifiers."""

import copy
import json
import math

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.procedures.relearn import relearn_time
from lightning_unlearn.procedures.relearn_result import RELEARN_SETTINGS, RelearnResult, RelearnRun, RelearnSetting
from lightning_unlearn.utilities.rng import seed_of


class Line(LightningModule):
    """One weight that is pulled to the data's value: with rate 1/4 the distance halves at every step."""

    def __init__(self, start=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start]))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.log("loss", 0.0)
        self.seen.append(len(batch))
        return (self.weight - batch).square().mean()


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])


def ones(count=4, batch_size=2):
    return DataLoader(torch.ones(count, 1), batch_size=batch_size, shuffle=True)


def setting(**changes):
    return RelearnSetting(**{"learning_rate": 0.25, "threshold": 0.01, "samples_per_epoch": 4, **changes})


def classes(count=40):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(count) % 3
    return torch.eye(6)[y] * 3 + torch.randn(count, 6, generator=generator), y


def by_hand(model, x, y, forget, *, rate, threshold, samples, batch_size, epochs, seed=0, penalty=0.0):
    """The papers' loop, written out: (steps, epochs, losses)."""
    net = copy.deepcopy(model.net).eval()
    start = [parameter.detach().clone() for parameter in net.parameters()]

    def look():
        with torch.no_grad():
            return cross_entropy(net(x[forget]), y[forget]).item()

    losses, steps = [look()], 0
    for epoch in range(1, epochs + 1):
        generator = torch.Generator().manual_seed(seed_of(seed, "relearn", epoch))
        for rows in torch.randint(len(x), (samples,), generator=generator).split(batch_size):
            loss = cross_entropy(net(x[rows]), y[rows])
            loss = loss + penalty * sum((p - s).square().sum() for p, s in zip(net.parameters(), start, strict=True))
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                    parameter -= rate * gradient
            steps += 1
        losses.append(look())
        if losses[-1] <= threshold:
            return steps, epoch, losses
    return None, None, losses


def test_steps_and_epochs_are_counted_and_the_model_is_left_alone():
    model = Line()
    state = torch.get_rng_state()
    run = relearn_time(model, ones(), setting=setting(check_every=1)).model
    assert (run.steps, run.epochs) == (4, 2)
    assert run.losses == pytest.approx([0.25**k for k in range(5)])
    assert (model.weight.item(), model.weight.grad, model.seen, model.training) == (0.0, None, [], True)
    assert torch.equal(torch.get_rng_state(), state)
    at_the_end = relearn_time(model, ones(), setting=setting(threshold=0.1)).model
    assert (at_the_end.steps, at_the_end.epochs) == (2, 1)
    assert len(at_the_end.losses) == 2


def test_an_untouched_model_needs_no_step_and_a_farther_one_more():
    counts = []
    for start in (1.0, 0.5, 0.0, -3.0, -31.0):
        run = relearn_time(Line(start), ones(), setting=setting(check_every=1)).model
        counts.append(run.steps)
    assert counts == [0, 3, 4, 6, 9], "2^-steps times the distance has to be at most 0.1"


def test_a_cap_and_a_divergence_are_no_numbers():
    capped = relearn_time(Line(), ones(), retrained=Line(0.5), setting=setting(max_epochs=1))
    assert (capped.model.end, capped.model.steps, capped.model.epochs) == ("capped", None, None)
    assert (capped.model.steps_taken, capped.ratio) == (2, None)
    assert "cap of 1 epoch (2 steps)" in capped.verdict
    assert "two numbers" in capped.verdict
    diverged = relearn_time(Line(), ones(), setting=setting(learning_rate=1e30)).model
    assert (diverged.end, diverged.steps) == ("diverged", None)
    assert not math.isfinite(diverged.losses[-1])
    broken = relearn_time(Line(math.nan), ones(), setting=setting()).model
    assert (broken.end, broken.steps_taken) == ("diverged", 0)


def test_the_ratio_is_to_the_retrained_model():
    result = relearn_time(Line(0.5), ones(), retrained=Line(-31.0), setting=setting(check_every=1))
    assert result.ratio == pytest.approx(3 / 9)
    assert "faster than a model that never saw" in result.verdict
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (plain["model"]["steps"], plain["retrained"]["steps"], plain["ratio"]) == (3, 9, result.ratio)
    assert plain["setting"]["samples_per_epoch"] == 4
    slower = relearn_time(Line(-31.0), ones(), retrained=Line(0.5), setting=setting(check_every=1))
    assert "more slowly" in slower.verdict
    known = relearn_time(Line(0.5), ones(), retrained=Line(1.0), setting=setting())
    assert known.ratio is None
    assert "at the threshold already" in known.verdict
    alone = relearn_time(Line(0.5), ones(), setting=setting())
    assert (alone.retrained, alone.ratio) == (None, None)
    assert "no value is known" in alone.verdict
    same = RelearnRun("relearned", 2, 1, (1.0, 0.0))
    assert "just as fast" in RelearnResult(same, same, setting(), 0).verdict


@pytest.mark.parametrize("penalty", [0.0, 0.05])
def test_equals_the_papers_loop_written_out(penalty):
    model, (x, y) = Classifier(), classes()
    forget = torch.arange(10)
    y = y.clone()
    y[forget] = (y[forget] + 1) % 3  # labels a model that never saw them has no reason to give
    numbers = {"threshold": 0.9, "penalty": penalty}
    steps, epochs, losses = by_hand(model, x, y, forget, rate=0.1, samples=50, batch_size=8, epochs=30, **numbers)
    chosen = RelearnSetting(learning_rate=0.1, samples_per_epoch=50, max_epochs=30, **numbers)
    forgotten = DataLoader(TensorDataset(x[forget], y[forget]), batch_size=4)
    training = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, drop_last=True)
    state = copy.deepcopy(model.state_dict())
    run = relearn_time(model, forgotten, train_data=training, setting=chosen).model
    assert (run.steps, run.epochs) == (steps, epochs)
    assert run.losses == pytest.approx(losses, rel=1e-4)
    assert len(losses) > 2
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    again = relearn_time(model, forgotten, train_data=training, setting=chosen)
    assert again.model == run
    assert relearn_time(model, forgotten, train_data=training, setting=chosen, seed=1).model.losses != run.losses


def test_the_papers_settings():
    assert {name: one.learning_rate for name, one in RELEARN_SETTINGS.items()} == {"golatkar": 0.01, "scrub": 0.1}
    for one in RELEARN_SETTINGS.values():
        assert (one.threshold, one.max_epochs, one.samples_per_epoch) == (0.1, 100, 500)
        assert (one.batch_size, one.check_every, one.penalty) == (None, None, 0)
    assert relearn_time(Line(), ones(), setting="scrub").setting is RELEARN_SETTINGS["scrub"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0),
        ("threshold", -1),
        ("max_epochs", 0),
        ("samples_per_epoch", None),
        ("batch_size", 0),
        ("check_every", 0),
        ("penalty", -1.0),
    ],
)
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        setting(**{name: value})


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.ones(1)


class Manual(Line):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("model", "data", "change", "error", "match"),
    [
        (Line(), ones(), {"setting": "fast"}, ValueError, "golatkar"),
        (Line(), DataLoader(Stream()), {}, UnsupportedStrategyError, "map-style"),
        (Line(), ones(), {"train_data": DataLoader(torch.ones(2, 2), None)}, UnsupportedStrategyError, "batch size"),
        (Manual(), ones(), {}, UnsupportedStrategyError, "automatic optimization"),
        (Line().requires_grad_(False), ones(), {}, ValueError, "trainable"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_be_relearned(model, data, change, error, match):
    with pytest.raises(error, match=match):
        relearn_time(model, data, **{"setting": setting(), **change})
