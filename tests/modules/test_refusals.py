import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.utilities.compile import from_compiled, to_uncompiled

from lightning_unlearn.exceptions import MissingRequirementError, UnsupportedStrategyError
from lightning_unlearn.methods.amnesiac import Amnesiac
from lightning_unlearn.methods.fine_tune import FineTune
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from tests.modules.cases import Adversarial, Joint, User, same, weights


class Named(User):
    def unwrap(self):
        return None


class Iterating(User):
    def training_step(self, dataloader_iter):
        return next(dataloader_iter)


class Stepless(LightningModule):
    def configure_optimizers(self):
        return None


class Optimizerless(LightningModule):
    def training_step(self, batch):
        return batch.sum()


class Slotted(User):
    __slots__ = ("hidden",)


def with_entry(name, value):
    model = User()
    setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: (torch.nn.Linear(1, 1), Joint()), TypeError, "a LightningModule"),
        (lambda: (torch.compile(User()), Joint()), TypeError, "It was compiled"),
        (lambda: (User(), Amnesiac()), TypeError, "a LossMethod"),
        (lambda: (Stepless(), Joint()), MissingRequirementError, "a `training_step`"),
        (lambda: (Optimizerless(), Joint()), MissingRequirementError, "Give the method an `optimizer`"),
        (lambda: (Iterating(), Joint()), UnsupportedStrategyError, "dataloader_iter"),
        (lambda: (Slotted(), Joint()), UnsupportedStrategyError, "__slots__"),
        (lambda: (Named(), Joint()), UnsupportedStrategyError, "without an attribute `unwrap`"),
        (lambda: (with_entry("user_step", 1), Joint()), UnsupportedStrategyError, "without an attribute `user_step`"),
        (
            lambda: (with_entry("silent", torch.nn.Linear(1, 1)), Joint()),
            UnsupportedStrategyError,
            "without an attribute `silent`",
        ),
        (lambda: (with_entry("training_step", print), Joint()), UnsupportedStrategyError, "`training_step` is its"),
        (lambda: (with_entry("log", print), Joint()), UnsupportedStrategyError, "`log` is its"),
        (
            lambda: (with_entry("configure_optimizers", print), Joint()),
            UnsupportedStrategyError,
            "`configure_optimizers` is its",
        ),
        (lambda: (from_compiled(torch.compile(User())), Joint()), UnsupportedStrategyError, "to_uncompiled"),
        (lambda: (Adversarial(), Joint()), UnsupportedStrategyError, "manual optimization"),
        (
            lambda: (Adversarial(), FineTune(optimizer=torch.optim.SGD)),
            UnsupportedStrategyError,
            "steps the optimizers of its own",
        ),
    ],
)
def test_what_cannot_be_wrapped_is_refused_before_anything_changes(build, error, message):
    model, method = build()
    kept, state = set(model.__dict__), weights(model)
    with pytest.raises(error, match=message):
        UnlearningModule(model, method)
    assert set(model.__dict__) == kept
    assert same(weights(model), state)


def test_a_method_with_an_optimizer_needs_none_of_the_module():
    assert UnlearningModule(Optimizerless(), Joint(optimizer=torch.optim.SGD)).unwrap()


def test_what_uncompiling_leaves_behind_is_no_obstacle():
    model = to_uncompiled(from_compiled(torch.compile(User())))
    assert "training_step" in model.__dict__
    wrapped = UnlearningModule(model, Joint())
    assert wrapped.training_step.__func__ is UnlearningModule.training_step
    assert wrapped.unwrap().training_step.__func__ is User.training_step
