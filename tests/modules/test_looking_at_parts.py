"""What a method may look at before its first step: both parts of the data, and the user's loss on them."""

import copy
from typing import ClassVar

import pytest
import torch
from torch.nn import functional

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import MissingRequirementError, UnsupportedStrategyError
from lightning_unlearn.methods import LossMethod
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from tests.modules.cases import Adversarial, User, loader, same, trainer, weights

FORGET = range(0, 40, 3)


class Answering(User):
    """With a `forward`."""

    def forward(self, x):
        return self.net(x)


class Looks(LossMethod):
    """Keeps the eval-mode losses, gradients and logits of a part, then fine-tunes."""

    guarantee: ClassVar = "heuristic"
    source: ClassVar = "a test"
    combines_losses: ClassVar = False

    def __init__(self, part="retain"):
        super().__init__(max_steps=1)
        self.part = part
        self.seen, self.state, self.modes = [], None, None

    def prepare(self, host):
        parameters = dict(host.named_parameters())
        self.modes = [module.training for module in host.modules()]
        before = weights(host)
        with host.differentiable() as (loss, outputs):
            for batch in host.part_loader(self.part):
                value = loss(batch)
                gradient = torch.autograd.grad(value, list(parameters.values()))
                self.seen.append((batch[1], value.detach(), gradient, outputs(batch)))
        assert same(before, weights(host))
        assert self.modes == [module.training for module in host.modules()]
        assert all(parameter.grad is None for parameter in parameters.values())
        self.agreed = host.agreed({"value": 3})
        assert host.global_step == host.acc.update_count == 0

    def step(self, host, batch, batch_idx):
        return host.user_step("retain", batch["retain"], batch_idx)


def look(model, method, **fit):
    wrapped = UnlearningModule(model, method)
    try:
        trainer(max_steps=1, max_epochs=1).fit(wrapped, **fit)
    finally:
        wrapped.unwrap()


def parts(method):
    return UnlearningDataModule(loader(), FORGET, seed=1).with_parts(method.parts)


@pytest.mark.parametrize("part", ["forget", "retain"])
def test_the_loss_of_every_sample_of_a_part_in_eval_mode(part):
    method, model = Looks(part), Answering()
    look(copy.deepcopy(model), method, datamodule=parts(method))
    x, y = loader().dataset.tensors
    chosen = [index for index in range(40) if (index in FORGET) == (part == "forget")]
    assert torch.cat([targets for targets, *_ in method.seen]).tolist() == y[chosen].tolist()
    model.eval()
    start = 0
    for targets, value, gradient, (logits, same_targets) in method.seen:
        rows = chosen[start : start + len(targets)]
        start += len(targets)
        wanted = functional.cross_entropy(model.net(x[rows]), y[rows])
        assert torch.equal(value, wanted.detach())
        for mine, theirs in zip(gradient, torch.autograd.grad(wanted, list(model.parameters())), strict=True):
            torch.testing.assert_close(mine, theirs)
        assert torch.equal(logits, model.net(x[rows]))
        assert torch.equal(same_targets, targets)
    assert method.agreed == {"value": 3}


def test_what_cannot_be_looked_at_is_said():
    with pytest.raises(MissingRequirementError, match="`datamodule` to be an `UnlearningDataModule` for Looks"):
        look(User(), Looks(), train_dataloaders={"retain": loader()})
    method = Looks()
    with pytest.raises(UnsupportedStrategyError, match="optimized automatically"):
        look(Adversarial(), method, datamodule=parts(method))
