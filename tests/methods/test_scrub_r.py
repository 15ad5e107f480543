"""SCRUB+R goes back to the weights whose forget error is that of unseen data: counted by hand, from copies."""

import copy

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.api import unlearn
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods import Scrub, ScrubR
from tests.methods.plain_loops import Classifier, YesNo, assert_same_weights, run
from tests.modules.cases import dataset, loader

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`:UserWarning")

FORGET = [row for row, label in enumerate(dataset().tensors[1].tolist()) if label != 2][:12]
VAL = dataset(60, seed=9)


def memorised(kind=Classifier):
    """Knows every row by heart, wrong as the labels are."""
    model = kind()
    x, y = dataset().tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        functional.cross_entropy(model.net(x), y).backward()
        optimizer.step()
    return model


def error(weights, x, y):
    net = copy.deepcopy(Classifier()).eval()
    net.load_state_dict(weights)
    return sum(int(net(row[None]).argmax() != label) for row, label in zip(x, y, strict=True)) / len(y)


def loaders(val=VAL):
    return {"train": loader(), "val": DataLoader(val, 16)}


@pytest.mark.parametrize("rate", [0.03, 0.1, 0.2])
def test_back_to_the_epoch_with_the_right_error(rate):
    method = ScrubR(epochs=4, msteps=2, max_divergence=None, optimizer=lambda ps: torch.optim.SGD(ps, rate, 0.9))
    mine, seen = run(method, memorised(), loaders(), forget=FORGET)
    kept = [weights for weights, parts in zip(seen.weights, method.schedule, strict=True) if parts == ("retain",)]
    (x, y), (val_x, val_y) = (tensor[FORGET] for tensor in dataset().tensors), VAL.tensors
    errors = [error(weights, x, y) for weights in kept]
    known = val_y != 2  # the forget data have no such label
    reference = error(kept[-1], val_x[known], val_y[known])
    distances = [abs(one - reference) for one in errors]
    chosen = max(epoch for epoch, one in enumerate(distances) if one == min(distances))
    assert len(set(errors)) > 1, "nothing to choose from"
    wanted = Classifier()
    wanted.load_state_dict(kept[chosen])
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), wanted.state_dict().values(), strict=True))
    (remark,) = method.remarks()
    assert f"epoch {chosen + 1} of 4, whose error on the forget data ({errors[chosen]:.3f})" in remark
    assert f"({reference:.3f})" in remark
    assert method._kept == []


def test_without_going_back_it_is_scrub():
    settings = {"epochs": 1, "msteps": 1}
    mine, _ = run(ScrubR(**settings), memorised(), loaders(), forget=FORGET)
    scrubbed, _ = run(Scrub(**settings), memorised(), loaders(), forget=FORGET)
    assert_same_weights(mine, scrubbed, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Retain data before:lightning_unlearn.exceptions.UnlearningWarning")
def test_the_result_says_where_it_went():
    result = unlearn(memorised(), FORGET, method=ScrubR(), data=loaders(), seed=1, probe_samples=0)
    (note,) = [one for one in result.notes if "went back" in one]
    assert "of 5" in note


def test_what_it_needs_is_said_before_any_step():
    with pytest.raises(MissingRequirementError, match="ScrubR needs validation data"):
        unlearn(memorised(), FORGET, method=ScrubR(), data=loader())
    with pytest.raises(MissingRequirementError, match="ScrubR needs validation data"):
        run(ScrubR(), memorised(), loader(), forget=FORGET)
    lacking = TensorDataset(*(tensor[VAL.tensors[1] != 1] for tensor in VAL.tensors))
    with pytest.raises(MissingRequirementError, match="every class in the forget data, but got 'none of 1'"):
        run(ScrubR(), memorised(), loaders(lacking), forget=FORGET)
    x, y = dataset().tensors
    questions = TensorDataset(x, functional.one_hot(y, 3).float())
    data = {"train": DataLoader(questions, 8, shuffle=True), "val": DataLoader(questions, 8)}
    with pytest.raises(MissingRequirementError, match="class numbers for ScrubR"):
        run(ScrubR(), memorised(YesNo), data, forget=FORGET)
