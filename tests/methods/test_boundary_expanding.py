"""Boundary Expanding against a classifier that really has one more row, and the module that comes back."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods import BoundaryExpanding
from tests.methods.plain_loops import (
    Classifier,
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


class Normalised(Classifier):
    """Answers with log-probabilities, so that the extra class must come in before the end."""

    def forward(self, x):
        return self.net(x).log_softmax(1)


class Distracting(Classifier):
    """Registers linear layers after the classifier: one is frozen, the other has another purpose."""

    def __init__(self):
        super().__init__()
        self.helper = nn.Linear(5, 5)
        self.fixed = nn.Linear(2, 2).requires_grad_(False)


def row(seed=0):
    """The extra row's initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(8, 1)


def expanded(model, extra):
    """A module whose classifier has one more row."""
    wider, old = copy.deepcopy(model), model.net[3]
    wider.net[3] = nn.Linear(8, CLASSES + 1)
    with torch.no_grad():
        wider.net[3].weight.copy_(torch.cat((old.weight, extra.weight)))
        wider.net[3].bias.copy_(torch.cat((old.bias, extra.bias)))
    return wider


def narrowed(wider, model):
    """The row dropped."""
    back = copy.deepcopy(model)
    kept = {name: value[:CLASSES] if name.startswith("net.3") else value for name, value in wider.state_dict().items()}
    back.load_state_dict(kept)
    return back


def loss_of(student, parts):
    x, _ = parts["forget"]
    logits = logits_by_running_statistics(student.net, x)
    return functional.cross_entropy(logits, torch.full((len(x),), CLASSES))


@pytest.mark.parametrize("kind", [Classifier, Normalised])
def test_as_a_classifier_with_one_more_row(kind):
    model = pretrained(kind)
    before = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    mine, seen = run(BoundaryExpanding(max_steps=6, stop=None, optimizer=sgd, seed=4), model)
    wider = plain(expanded(model, row(4)), seen.batches, loss_of)
    assert_same_weights(mine, narrowed(wider, model))
    assert {name: tuple(value.shape) for name, value in mine.state_dict().items()} == before
    assert not mine.net[3]._forward_hooks
    assert not torch.allclose(mine.net[3].weight, model.net[3].weight, atol=1e-2)
    # the data went to the extra class, which is what pulled at the others
    x = torch.cat([parts["forget"][0] for _, parts in seen.batches])
    shares = [functional.softmax(one.eval().net(x), 1)[:, CLASSES].mean() for one in (expanded(model, row(4)), wider)]
    assert shares[1] > shares[0] + 0.2


def test_the_row_is_trained_at_the_classifiers_rate_and_leaves_no_trace():
    optimizers = []

    def grouped(parameters):
        body, head = [], []
        for parameter in parameters:
            (head if parameter.shape[0] == CLASSES else body).append(parameter)
        optimizers.append(torch.optim.SGD([{"params": body, "lr": 0.0}, {"params": head, "lr": 0.1}]))
        return optimizers[-1]

    method, model = BoundaryExpanding(max_steps=1, stop=None, optimizer=grouped), pretrained()
    mine, _ = run(method, model)
    assert torch.equal(mine.net[0].weight, model.net[0].weight)
    (optimizer,) = optimizers
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4]
    extra = optimizer.param_groups[1]["params"][2:]
    assert [tuple(one.shape) for one in extra] == [(1, 8), (1,)]
    assert (extra[0] != row().weight).any()
    assert method._row is None
    assert method._classifier is None


def test_optimizers_that_know_names_and_clipping_know_the_row():
    class Named(Classifier):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.named_parameters(), lr=0.1)

    model = pretrained(Named)
    mine, _ = run(BoundaryExpanding(max_steps=3, stop=None, lr_scale=1.0), model, gradient_clip_val=0.5)
    assert not torch.equal(mine.net[3].weight, model.net[3].weight)


def test_which_layer_is_the_classifier():
    model = pretrained(Distracting)
    with pytest.raises(MissingRequirementError, match=r"one of 5 outputs, where 3 logits came back.*Pass `layer`"):
        run(BoundaryExpanding(stop=None), model)
    named, seen = run(BoundaryExpanding(layer="net.3", max_steps=2, stop=None, optimizer=sgd), model)
    assert_same_weights(named, narrowed(plain(expanded(model, row()), seen.batches, loss_of), model))
    for wrong in ("net.1", "net.9"):
        with pytest.raises(MissingRequirementError, match=r"the name of an `nn\.Linear`"):
            run(BoundaryExpanding(layer=wrong, stop=None), model)
    frozen = pretrained()
    for one in (frozen.net[0], frozen.net[3]):
        one.requires_grad_(False)
    with pytest.raises(MissingRequirementError, match=r"no `nn\.Linear` has a trainable weight"):
        run(BoundaryExpanding(stop=None), frozen)


def test_other_targets_are_refused_and_no_hook_stays_behind():
    questions = DataLoader(TensorDataset(X, functional.one_hot(Y, CLASSES).float()), 8, shuffle=True)
    with pytest.raises(MissingRequirementError, match="class numbers for BoundaryExpanding"):
        run(BoundaryExpanding(stop=None), pretrained(YesNo), questions)

    class Breaking(Classifier):
        def forward(self, x):
            kept.append(self)
            raise RuntimeError("broken")

    kept = []
    with pytest.raises(RuntimeError, match="broken"):
        run(BoundaryExpanding(stop=None), pretrained(Breaking))
    assert kept
    assert not kept[0].net[3]._forward_hooks


def test_labels_that_are_to_be_ignored_stay():
    y = Y.clone()
    y[::3] = -100  # all that is forgotten but one
    y[0] = 1
    data = DataLoader(TensorDataset(X, y), 16, shuffle=True)
    mine, seen = run(BoundaryExpanding(max_steps=1, stop=None, optimizer=sgd), (model := pretrained()), data)
    (x, targets) = seen.batches[0][1]["forget"]
    assert int((targets >= 0).sum()) == 1

    def only_one(student, parts):
        chosen = torch.where(targets < 0, targets, torch.full_like(targets, CLASSES))
        return functional.cross_entropy(logits_by_running_statistics(student.net, x), chosen)

    assert_same_weights(mine, narrowed(plain(expanded(model, row()), seen.batches, only_one), model))
