"""Probes of modules that are no classifiers of (x, y) batches: their own loss, or nothing, and never a crash."""

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.api import unlearn
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods import FineTune
from lightning_unlearn.procedures.outputs import collect_outputs
from lightning_unlearn.procedures.probes import probe


def rows(targets=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(12) % 3 if targets is None else targets(x)), batch_size=4)


class StepOnly(LightningModule):
    """Everything is in `training_step`; there is no `forward`."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Regressor(StepOnly):
    """Float targets."""

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self(batch[0]), batch[1])


class Adversarial(LightningModule):
    """`forward` makes samples out of noise of another size; two optimizers, by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, noise):
        return self.generator(noise)

    def training_step(self, batch, batch_idx):
        makes, judges = self.optimizers()
        real = batch[0]
        fake = self(torch.randn(len(real), 2))
        judges.zero_grad()
        self.manual_backward((self.critic(fake.detach()) - self.critic(real)).mean())
        judges.step()
        makes.zero_grad()
        self.manual_backward(-self.critic(fake).mean())
        makes.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.critic)]


def test_without_forward_the_loss_is_probed():
    model = StepOnly()
    found = probe(model, rows())
    assert set(found) == {"loss"}
    x, y = rows().dataset.tensors
    assert found["loss"] == pytest.approx(float(functional.cross_entropy(model.layer(x), y).detach()), rel=1e-5)


def test_a_regression_is_probed_by_its_own_loss():
    model = Regressor()
    found = probe(model, rows(lambda x: x[:, :3] * 2))
    assert set(found) == {"loss"}
    x, y = rows(lambda x: x[:, :3] * 2).dataset.tensors
    assert found["loss"] == pytest.approx(float(functional.mse_loss(model(x), y).detach()), rel=1e-5)


def test_a_generator_has_nothing_to_probe_and_can_still_be_repaired():
    model = Adversarial()
    assert probe(model, rows()) == {}
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    result = unlearn(model, [3], method=FineTune(max_steps=4), data=rows(), trainer=options)
    assert [stage.steps for stage in result.stages] == [4]
    assert not torch.equal(result.model.generator.weight, model.generator.weight)


@pytest.mark.parametrize(("model", "cause"), [(StepOnly(), "NotImplementedError"), (Adversarial(), "RuntimeError")])
def test_reading_outputs_of_such_modules_says_what_to_pass(model, cause):
    with pytest.raises(MissingRequirementError, match=rf"`forward` .* got '{cause}.*pass `adapter`"):
        collect_outputs(model, rows())


def test_a_machine_without_memory_is_not_a_missing_adapter():
    model = Regressor()

    def exhausted(x):
        raise torch.OutOfMemoryError("too much")

    model.layer.forward = exhausted
    with pytest.raises(torch.OutOfMemoryError):
        probe(model, rows())
