"""Outputs of a user's module: right values, nothing disturbed, clear refusals."""

import random

import numpy as np
import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.procedures.outputs import collect_outputs, collect_outputs_together
from tests.helpers.models import BoringClassifier, IdDataset


class PairClassifier(LightningModule):
    """BatchNorm and dropout, logs in its steps, and records every hook that must not run here."""

    def __init__(self, log_probabilities=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
        self.log_probabilities = log_probabilities
        self.calls = []

    def forward(self, x):
        logits = self.net(x)
        return logits.log_softmax(1) if self.log_probabilities else logits

    def training_step(self, batch, batch_idx):
        self.calls.append("training_step")
        self.log("loss", 0.0)

    validation_step = training_step

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 2, batch[1]]


def pairs(count=11, seed=0, shuffle=False):
    generator = torch.Generator().manual_seed(seed)
    dataset = TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 3)
    return DataLoader(dataset, batch_size=4, shuffle=shuffle)


def test_values_equal_a_plain_loop_with_the_users_transfer_hooks():
    model, loader = PairClassifier(), pairs()
    outputs = collect_outputs(model, loader)
    x, y = loader.dataset.tensors
    model.eval()
    with torch.no_grad():
        logits = model.net(x * 2)
    torch.testing.assert_close(outputs.logits, logits)
    assert outputs.logits.dtype == torch.float32
    assert torch.equal(outputs.targets, y)
    assert outputs.losses.dtype == torch.float64
    torch.testing.assert_close(outputs.losses, cross_entropy(logits.double(), y, reduction="none"), rtol=1e-5, atol=0)
    torch.testing.assert_close(outputs.confidences, logits.double().softmax(1)[range(11), y], rtol=1e-5, atol=0)
    assert torch.equal(outputs.correct, logits.argmax(1) == y)
    assert len(outputs) == 11


def test_log_probabilities_give_the_same_losses():
    plain, logs = PairClassifier(), PairClassifier(log_probabilities=True)
    logs.load_state_dict(plain.state_dict())
    loader = pairs()
    torch.testing.assert_close(
        collect_outputs(plain, loader).losses, collect_outputs(logs, loader).losses, rtol=1e-5, atol=1e-6
    )


def test_nothing_is_disturbed():
    model = PairClassifier()
    model.train()
    model.net[1].eval()
    modes = [part.training for part in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = collect_outputs(model, pairs(shuffle=True))
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert model.calls == []
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not first.logits.requires_grad
    again = collect_outputs(model, pairs(shuffle=True))
    assert torch.equal(first.logits, again.logits)


def test_modes_come_back_after_a_failure():
    model = PairClassifier().train()

    def failing(module, batch):
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        collect_outputs(model, pairs(), adapter=failing)
    assert model.training


def test_models_are_shown_the_same_batches_even_shuffled():
    first, second = PairClassifier(), PairClassifier()
    second.load_state_dict(first.state_dict())
    found = collect_outputs_together({"a": first, "b": second}, pairs(64, shuffle=True))
    assert torch.equal(found["a"].logits, found["b"].logits)
    assert not torch.equal(found["a"].targets, pairs(64).dataset.tensors[1])


def test_an_adapter_opens_other_batches():
    model, loader = BoringClassifier(), DataLoader(IdDataset(10), batch_size=4)
    outputs = collect_outputs(model, loader, adapter=lambda module, batch: (module(batch["x"]), batch["y"]))
    assert torch.equal(outputs.targets, loader.dataset.y)
    with pytest.raises(MissingRequirementError, match=r"Expected `batch` to be a pair .* got 'dict'.*pass `adapter`"):
        collect_outputs(model, loader)


def test_other_targets_score_the_same_answers():
    outputs = collect_outputs(PairClassifier(), pairs())
    other = outputs.with_targets((outputs.targets + 1) % 3)
    assert other.logits is outputs.logits
    assert not torch.equal(other.losses, outputs.losses)
    assert torch.equal(outputs.with_targets(outputs.targets).losses, outputs.losses)
    with pytest.raises(ValueError, match="targets"):
        outputs.with_targets(torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        (lambda module, batch: (module(batch[0]).argmax(1), batch[1]), "logits"),
        (lambda module, batch: ({"out": module(batch[0])}, batch[1]), "got 'dict'"),
        (lambda module, batch: (module(batch[0]).argmax(1, keepdim=True), batch[1]), "floating"),
        (lambda module, batch: (module(batch[0]), batch[1].float()), "integer class numbers"),
        (lambda module, batch: (module(batch[0]), batch[1][:1]), "4 integer class numbers"),
        (lambda module, batch: (module(batch[0]), batch[1] + 1), "from 0 to 2, but got 3"),
        (lambda module, batch: (module(batch[0]), batch[1] - 1), "from 0 to 2, but got -1"),
    ],
)
def test_refuses_what_is_not_logits_and_targets(adapter, match):
    with pytest.raises(MissingRequirementError, match=match):
        collect_outputs(PairClassifier(), pairs(), adapter=adapter)


def test_refuses_an_empty_loader():
    with pytest.raises(ValueError, match="at least one batch"):
        collect_outputs(PairClassifier(), DataLoader(TensorDataset(torch.zeros(0, 4), torch.zeros(0))))


def test_another_device_is_left_again():
    model = PairClassifier()
    seen = []

    def adapter(module, batch):
        seen.append((module.device.type, batch[0].device.type))
        count = len(batch[1])
        return torch.zeros(count, 3), torch.zeros(count, dtype=torch.long)

    class Stays(PairClassifier):
        """Moved to a device that holds no data, and brought back with new storage."""

        def to(self, device):
            seen.append(str(device))
            return self

    outputs = collect_outputs(Stays(), pairs(4), adapter=adapter, device="cpu")
    assert seen == ["cpu", ("cpu", "cpu"), "cpu"]
    assert len(outputs) == 4
    assert model.device.type == "cpu"
