"""UNSIR's noise, and its two halves against a loop in plain torch; classes that are not whole are refused."""

import copy

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.api import unlearn
from lightning_unlearn.exceptions import DeletionRequestError, MissingRequirementError
from lightning_unlearn.methods import Unsir
from tests.methods.plain_loops import (
    YesNo,
    assert_same_weights,
    logits_without_learning,
    plain,
    pretrained,
    run,
    sgd,
)
from tests.modules.cases import CLASSES, dataset, loader

X, Y = dataset().tensors
ONE, TWO = (torch.nonzero(torch.isin(Y, torch.tensor(classes))).flatten().tolist() for classes in ([1], [0, 1]))


class Watched(Unsir):
    """Keeps its noise."""

    def prepare(self, host):
        super().prepare(host)
        self._kept = [tensor.clone() for tensor in self._noise]


def noise_of(model, labels, *, steps, lr=0.1, penalty=0.1, seed=0):
    """Adam written out, sample by sample: each has a loss of its own."""
    net = copy.deepcopy(model).eval().net.double()
    start = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(seed)).double()
    found = []
    for row, label in zip(start, labels, strict=True):
        first, second = torch.zeros(5).double(), torch.zeros(5).double()
        for step in range(1, steps + 1):
            moving = row[None].clone().requires_grad_()
            wrong = -net(moving).log_softmax(1)[0, label]
            (gradient,) = torch.autograd.grad((penalty * moving.square().sum() - wrong) / len(labels), moving)
            first = 0.9 * first + 0.1 * gradient[0]
            second = 0.999 * second + 0.001 * gradient[0] ** 2
            row = row - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        found.append(row.float())
    return torch.stack(found)


def test_the_noise_sample_by_sample_and_what_it_is_for():
    model = pretrained()
    method = Watched(noise_steps=15, impair_steps=1, repair_steps=0)
    run(method, model, forget=TWO)
    noise, labels = method._kept
    assert labels.tolist() == [0, 1] * 4
    torch.testing.assert_close(noise, noise_of(model, labels.tolist(), steps=15), rtol=1e-3, atol=1e-3)
    net = model.eval().net
    start = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    before, after = (functional.cross_entropy(net(one), labels) for one in (start, noise))
    known = functional.cross_entropy(net(X[TWO]), Y[TWO])
    assert after > 2 * before
    assert after > 5 * known
    assert method._noise is None


def test_the_penalty_keeps_the_noise_small():
    sizes = []
    for penalty in (0.0, 1.0):
        method = Watched(noise_penalty=penalty, impair_steps=1, repair_steps=0)
        run(method, pretrained(), forget=ONE)
        sizes.append(float(method._kept[0].square().sum(1).mean()))
    assert sizes[1] < 0.3 * sizes[0]


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_both_halves_against_a_loop(weight):
    model = pretrained()
    method = Watched(impair_steps=3, repair_steps=4, noise_weight=weight, optimizer=sgd)
    mine, seen = run(method, model, forget=ONE)
    assert [tuple(parts) for _, parts in seen.batches] == [("retain",)] * 7
    x_noise, y_noise = method._kept
    assert set(y_noise.tolist()) == {1}
    steps = []

    def loss_of(student, parts):
        x, y = parts["retain"]
        loss = functional.cross_entropy(student.net(x), y)
        steps.append(1)
        if len(steps) <= 3:
            loss = loss + weight * functional.cross_entropy(logits_without_learning(student.net, x_noise), y_noise)
        return loss

    assert_same_weights(mine, plain(model, seen.batches, loss_of))


def test_steps_are_the_optimizers_and_not_batches():
    class Counting(Unsir):
        def step(self, host, batch, batch_idx):
            loss = super().step(host, batch, batch_idx)
            x, y = batch["retain"]
            with torch.no_grad():
                alone = functional.cross_entropy(logits_without_learning(host.net, x), y)
            counted.append((host.global_step, loss.item() > alone.item() + 1e-4))
            return loss

    counted = []
    run(Counting(impair_steps=2, repair_steps=1), pretrained(), forget=ONE, accumulate_grad_batches=2)
    # three batches an epoch, of which the last is a step by itself
    assert counted == [(0, True), (0, True), (1, True), (2, False), (2, False)]


def test_of_the_forget_data_only_the_classes_are_used():
    x = X.clone()
    x[ONE] = 100.0
    other = DataLoader(TensorDataset(x, Y), 8, shuffle=True)
    settings = {"impair_steps": 4, "repair_steps": 2}
    assert_same_weights(
        run(Unsir(**settings), pretrained(), other, forget=ONE)[0],
        run(Unsir(**settings), pretrained(), loader(), forget=ONE)[0],
        rtol=0,
        atol=0,
    )


def test_a_class_is_forgotten_and_the_others_stay():
    model = pretrained()
    result = unlearn(model, ONE, method=Unsir(), data=loader(), seed=1, probe_samples=0)
    others = [row for row in range(len(Y)) if row not in ONE]

    def accuracy(one, rows):
        return float((one.eval().net(X[rows]).argmax(1) == Y[rows]).float().mean())

    assert accuracy(model, ONE) > 0.6
    assert accuracy(result.model, ONE) < 0.2
    assert accuracy(result.model, others) > accuracy(model, others) - 0.1


def test_classes_that_are_kept_in_part_are_refused_before_any_step():
    with pytest.raises(DeletionRequestError, match=r"whole classes for Unsir.*some samples of class 0, 1, "):
        run(Unsir(), pretrained(), forget=[*TWO[1:-1]])


@pytest.mark.parametrize(
    ("kind", "tensors", "match"),
    [
        (YesNo, (X, functional.one_hot(Y, CLASSES).float()), "one class number a sample"),
        (None, ((X * 10).long(), Y), "a floating-point tensor for Unsir"),
    ],
    ids=["questions", "inputs"],
)
def test_other_data_are_refused(kind, tensors, match):
    model = pretrained() if kind is None else pretrained(kind)
    with pytest.raises(MissingRequirementError, match=match):
        run(Unsir(), model, DataLoader(TensorDataset(*tensors), 8, shuffle=True), forget=ONE)


@pytest.mark.parametrize(
    "settings",
    [{"noise_lr": 0.0}, {"noise_penalty": -1.0}, {"noise_weight": 0.0}, {"impair_steps": 0}, {"repair_steps": -1}],
    ids=lambda settings: next(iter(settings)),
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Unsir(**settings)
