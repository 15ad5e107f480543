from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.utilities.batch_adapter import BatchAdapter, as_batch_adapter

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


class Row(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    weight: float


class Text(nn.Module):
    """Takes keywords and answers with an object, as language models do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, words, mask):
        return {"logits": self.net(words * mask), "hidden": words}


@pytest.mark.parametrize(
    "batch", [(X, Y), [X, Y], (X, Y, "extra"), Row(X, Y, 0.5)], ids=["tuple", "list", "3", "named"]
)
def test_sequences_keep_their_kind(batch):
    adapter, net = BatchAdapter(), nn.Linear(4, 3)
    logits, targets = adapter(net, batch)
    assert torch.equal(logits, net(X))
    assert targets is Y
    other = adapter.replaced(batch, inputs=X + 1, targets=2 - Y)
    assert type(other) is type(batch)
    assert torch.equal(other[0], X + 1)
    assert torch.equal(other[1], 2 - Y)
    assert list(other[2:]) == list(batch[2:])
    assert adapter.replaced(batch, targets=2 - Y)[0] is X
    assert batch[1] is Y


def test_mappings_by_keyword_and_by_key():
    batch, text = {"words": X, "mask": torch.ones(6, 1), "labels": Y}, Text()
    adapter = BatchAdapter()
    assert torch.equal(adapter(text, batch)[0], text.net(X))
    other = adapter.replaced(batch, inputs={"words": 2 * X}, targets=2 - Y)
    assert torch.equal(adapter(text, other)[0], text.net(2 * X))
    assert torch.equal(other["labels"], 2 - Y)
    by_key = BatchAdapter(target_key="y", input_key="x")
    assert torch.equal(by_key(text.net, {"x": X, "y": Y, "id": 3})[0], text.net(X))
    other = by_key.replaced({"x": X, "y": Y, "id": 3}, inputs=-X)
    assert torch.equal(other.pop("x"), -X)
    assert other == {"y": Y, "id": 3}


def test_losses():
    adapter, logits = BatchAdapter(), torch.randn(2, 3, 5, 5)
    segmented = torch.randint(0, 3, (2, 5, 5))
    assert adapter.loss(logits, segmented) == functional.cross_entropy(logits, segmented)
    labels = torch.randint(0, 2, (2, 3)).float()
    assert adapter.loss(logits[..., 0, 0], labels) == functional.binary_cross_entropy_with_logits(
        logits[..., 0, 0], labels
    )
    with pytest.raises(MissingRequirementError, match="floating-point numbers of the logits' shape"):
        adapter.loss(logits, torch.rand(2))


def test_wrong_targets():
    torch.manual_seed(0)
    adapter, targets = BatchAdapter(), torch.arange(4).repeat(3000)
    wrong = adapter.wrong_targets(targets, 4)
    assert not (wrong == targets).any()
    for true in range(4):
        shares = torch.bincount(wrong[targets == true], minlength=4) / 3000
        assert torch.allclose(shares[[one for one in range(4) if one != true]], torch.full((3,), 1 / 3), atol=0.04)
    anything = adapter.wrong_targets(targets, 4, avoid_true=False)
    assert float((anything == targets).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert adapter.wrong_targets(torch.tensor([[0.0, 1.0]]), 2).tolist() == [[1.0, 0.0]]
    assert adapter.wrong_targets(torch.tensor([-100, 1, -1]), 2).tolist() == [-100, 0, -1]  # what losses ignore
    with pytest.raises(ValueError, match="at least 2"):
        adapter.wrong_targets(targets, 1)
    for value in (-0.5, 1.5):
        with pytest.raises(MissingRequirementError, match="`wrong_targets` is overridden"):
            adapter.wrong_targets(torch.tensor([0.0, value]), 2)


@pytest.mark.parametrize("batch", [X, "text", (X,), {"x": X}, (X, 3)])
def test_other_batches_are_named(batch):
    with pytest.raises(MissingRequirementError, match=r"Expected `(batch|targets)`"):
        BatchAdapter()(nn.Linear(4, 3), batch)


def test_other_answers_are_named():
    with pytest.raises(MissingRequirementError, match="Expected `forward` to be returning logits"):
        BatchAdapter()(nn.Identity(), (torch.ones(3), Y))


def test_a_function_can_be_read_but_changes_no_batch():
    adapter = as_batch_adapter(lambda module, batch: (module(batch["x"]), batch["y"]))
    net = nn.Linear(4, 3)
    assert torch.equal(adapter(net, {"x": X, "y": Y})[0], net(X))
    with pytest.raises(MissingRequirementError, match="Subclass `BatchAdapter`"):
        adapter.replaced({"x": X, "y": Y}, targets=Y)
    assert as_batch_adapter(adapter) is adapter
