"""What a weight edit computes from: the user's own loss and logits, differentiable, without a trace."""

import copy

import pytest
import torch
from torch.nn import functional

from lightning_unlearn.exceptions import MissingRequirementError, UnsupportedStrategyError
from lightning_unlearn.methods.base import EditContext
from lightning_unlearn.modules.gradients import differentiable
from tests.modules.cases import Adversarial, User, dataset, same, weights

BATCH = tuple(tensor[:6] for tensor in dataset().tensors)


class Forwarding(User):
    def forward(self, x):
        return self.net(x)


def trained():
    model = Forwarding()
    model.net(dataset().tensors[0])  # running statistics that are not those of a fresh module
    return model


def test_the_gradient_is_that_of_the_users_loss_in_eval_mode():
    model = trained()
    twin = copy.deepcopy(model).eval()
    with differentiable(model) as (loss, _):
        found = torch.autograd.grad(loss(BATCH), list(model.parameters()))
    wanted = torch.autograd.grad(functional.cross_entropy(twin.net(BATCH[0]), BATCH[1]), list(twin.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_logits_come_through_the_adapter_and_can_be_differentiated_without_gradients_around():
    model = trained()
    with torch.no_grad(), differentiable(model, lambda module, batch: (2 * module(batch[0]), batch[1])) as (_, outputs):
        logits, targets = outputs(BATCH)
    assert logits.requires_grad
    assert torch.equal(targets, BATCH[1])
    assert torch.equal(logits, 2 * copy.deepcopy(model).eval().net(BATCH[0]))


def test_loss_and_logits_are_of_batches_behind_the_users_transfer_hooks():
    class Doubling(Forwarding):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [2 * batch[0], batch[1]]

    model, doubled = Doubling(), (2 * BATCH[0], BATCH[1])
    twin = copy.deepcopy(model).eval()
    with differentiable(model) as (loss, outputs):
        assert torch.equal(outputs(BATCH)[0], twin.net(doubled[0]))
        assert torch.equal(loss(BATCH), functional.cross_entropy(twin.net(doubled[0]), doubled[1]))


def test_nothing_is_left_behind():
    model = trained().train()
    model.net[0].eval()  # single layers keep their modes
    model.net[0].weight.grad = torch.ones_like(model.net[0].weight)
    before, modes = weights(model), [module.training for module in model.modules()]
    with differentiable(model) as (loss, outputs):
        torch.autograd.grad(loss(BATCH) + outputs(BATCH)[0].sum(), list(model.parameters()))
    assert same(weights(model), before)
    assert [module.training for module in model.modules()] == modes
    assert model.net[0].weight.grad.eq(1).all()
    assert model.acc.update_count == 0
    assert model._trainer is None


def test_manual_optimization_has_no_loss_to_differentiate():
    with pytest.raises(UnsupportedStrategyError, match="manual optimization"), differentiable(Adversarial()):
        pass


def test_a_method_that_did_not_ask_for_data_gets_none():
    context = EditContext(trained(), None, None, None)
    with pytest.raises(MissingRequirementError, match="Declare it"):
        context.loss(BATCH)
    with pytest.raises(MissingRequirementError, match="Declare it"):
        context.outputs(BATCH)
