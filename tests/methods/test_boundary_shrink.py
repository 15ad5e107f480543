"""Boundary Shrink's labels against a search sample by sample, and its pass against a loop in plain torch."""

import copy

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods import BoundaryShrink
from tests.methods.plain_loops import (
    FORGET,
    YesNo,
    assert_same_weights,
    logits_by_running_statistics,
    plain,
    pretrained,
    run,
    sgd,
)
from tests.modules.cases import CLASSES, dataset

X, Y = dataset().tensors


def across(net, x, y, *, epsilon, value_range=None, levels=None, avoid_true=True):
    """One sample after the other, and one entry after the other."""
    found = []
    for row, label in zip(x, y, strict=True):
        moving = row[None].clone().requires_grad_()
        (-net(moving).log_softmax(1)[0, label]).backward()
        entries = []
        for value, slope in zip(row.tolist(), moving.grad[0].tolist(), strict=True):
            moved = value + epsilon * ((slope > 0) - (slope < 0))
            if value_range is not None:
                moved = min(max(moved, value_range[0]), value_range[1])
            entries.append(moved if levels is None else round(moved * levels) / levels)
        scores = net(torch.tensor([entries]))[0].tolist()
        allowed = [one for one in range(CLASSES) if not (avoid_true and one == label)]
        found.append(max(allowed, key=lambda one, scores=scores: scores[one]))
    return found


class Watched(BoundaryShrink):
    """Keeps the labels it has trained on."""

    def nearest_targets(self, host, batch):
        found = super().nearest_targets(host, batch)
        self.__dict__.setdefault("_found", []).append((batch, found))
        return found


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(
    "settings",
    [{}, {"avoid_true": False}, {"value_range": (-1.0, 1.0), "levels": 4}],
    ids=["default", "label allowed", "clipped"],
)
def test_labels_are_those_across_the_boundary_of_the_original(epsilon, settings):
    model = pretrained()
    method = Watched(epsilon=epsilon, **settings, max_steps=6, stop=None, optimizer=lambda ps: torch.optim.SGD(ps, 0.5))
    run(method, model)
    net = copy.deepcopy(model).eval().net  # not of the model under way, whose weights have moved
    assert len(method._found) == 6
    for (x, y), found in method._found:
        assert found.tolist() == across(net, x, y.tolist(), epsilon=epsilon, **settings)
        assert settings.get("avoid_true", True) is False or (found != y).all()
    assert method._original is None


def test_the_label_itself_may_come_back_only_where_allowed():
    model, every = pretrained(), []
    for avoid_true in (True, False):
        method = Watched(epsilon=0.0, avoid_true=avoid_true, max_epochs=1, stop=None)
        run(method, model)
        every.append([int((found == y).sum()) for (_, y), found in method._found])
    assert sum(every[0]) == 0
    assert sum(every[1]) > 0  # what the model has learnt is still the answer at a step of length nothing


def test_the_whole_pass_against_a_loop():
    model = pretrained()
    mine, seen = run(BoundaryShrink(epsilon=0.5, max_steps=6, stop=None, optimizer=sgd), model)
    net = copy.deepcopy(model).eval().net

    def loss_of(student, parts):
        x, y = parts["forget"]
        found = torch.tensor(across(net, x, y.tolist(), epsilon=0.5))
        return functional.cross_entropy(logits_by_running_statistics(student.net, x), found)

    twin = plain(model, seen.batches, loss_of)
    assert_same_weights(mine, twin)
    assert torch.equal(mine.net[1].running_mean, model.net[1].running_mean)
    assert not torch.allclose(mine.net[0].weight, model.net[0].weight, atol=1e-2)


def test_multi_label_targets_are_the_answers_across():
    data = DataLoader(TensorDataset(X, functional.one_hot(Y, CLASSES).float()), 8, shuffle=True)
    method, model = Watched(epsilon=0.7, max_steps=2, stop=None), pretrained(YesNo)
    run(method, model, data)
    net = copy.deepcopy(model).eval().net
    for (x, y), found in method._found:
        moving = x.clone().requires_grad_()
        functional.binary_cross_entropy_with_logits(net(moving), y, reduction="sum").backward()
        assert torch.equal(found, (net(x + 0.7 * moving.grad.sign()) > 0).float())
        assert found.dtype == y.dtype


def test_labels_that_are_to_be_ignored_stay():
    y = Y.clone()
    y[list(FORGET)[:4]] = -100
    method = Watched(max_epochs=1, stop=None)
    run(method, pretrained(), DataLoader(TensorDataset(X, y), 8, shuffle=True))
    given, found = (torch.cat(both) for both in zip(*((y, found) for (_, y), found in method._found), strict=True))
    assert found[given < 0].tolist() == [-100] * 4
    assert (found[given >= 0] >= 0).all()


def test_inputs_that_cannot_be_moved_are_refused_before_any_step():
    whole = DataLoader(TensorDataset((X * 10).long(), Y), 8, shuffle=True)
    with pytest.raises(MissingRequirementError, match="floating-point tensor for BoundaryShrink"):
        run(BoundaryShrink(stop=None), pretrained(), whole)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"epsilon": -0.1}, "epsilon"), ({"value_range": (1.0, 0.0)}, "value_range"), ({"levels": 0}, "levels")],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        BoundaryShrink(**settings)
