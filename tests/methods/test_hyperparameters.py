"""How methods declare their hyper-parameters."""

import copy
import inspect
import pickle
from dataclasses import field
from typing import get_type_hints

import pytest

from lightning_unlearn.methods import (
    METHODS,
    FineTune,
    LossMethod,
    PartialUpdates,
    PushingMethod,
    UnlearningMethod,
    hyperparameters,
)

STEPS = {name: method for name, cls in METHODS.items() if hasattr(method := cls(), "max_steps")}


@hyperparameters
class Declared(FineTune):
    """Two of its own, one default of its base changed, one argument of its base taken away."""

    lr_scale: float = 0.5
    level: float = 1.0
    helper: object = field(default=None, repr=False)
    optimizer: object = field(default=None, init=False)

    def __post_init__(self):
        super().__post_init__()
        self.level = float(self.level)


class Written(Declared):
    """One with an `__init__` on top of declared ones."""

    def __init__(self, *, twice=1, **others):
        super().__init__(level=2 * twice, **others)
        self.twice = twice


def test_declared_ones_are_keyword_only_arguments():
    parameters = inspect.signature(Declared).parameters
    assert set(parameters) == {"max_steps", "max_epochs", "lr_scale", "level", "helper"}
    assert all(one.kind is one.KEYWORD_ONLY for one in parameters.values())
    assert parameters["lr_scale"].default == 0.5
    assert FineTune().lr_scale == pytest.approx(1 / 3)
    with pytest.raises(TypeError, match="optimizer"):
        Declared(optimizer=None)


def test_settings_leave_out_what_is_not_shown():
    method = Declared(level=2, helper=object())
    assert "helper" not in method.settings
    assert method.settings["level"] == 2.0
    assert "helper" not in repr(method)
    assert repr(method).startswith("Declared(max_steps=50, ")


def test_methods_are_equal_to_themselves_alone():
    first, second = Declared(), Declared()
    assert first != second
    assert len({first, second}) == 2


def test_an_init_may_call_that_of_a_declared_base():
    method = Written(twice=3, max_epochs=2)
    assert (method.level, method.max_steps, method.max_epochs, method.twice) == (6.0, None, 2, 3)
    with pytest.raises(ValueError, match="lr_scale"):
        Written(lr_scale=0.0)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_copies_have_the_same_settings(name):
    method = METHODS[name]()
    assert copy.copy(method).settings == method.settings
    assert pickle.loads(pickle.dumps(method)).settings == method.settings  # noqa: S301


@pytest.mark.parametrize("name", sorted(METHODS))
def test_types_are_known_wherever_the_arguments_were_declared(name):
    hints = get_type_hints(METHODS[name].__init__)
    assert set(hints) >= set(inspect.signature(METHODS[name]).parameters)
    assert not any(isinstance(hint, str) for hint in hints.values())


@pytest.mark.parametrize("name", sorted(STEPS))
def test_steps_are_the_default_unless_epochs_are_given(name):
    method, parameters = STEPS[name], inspect.signature(METHODS[name]).parameters
    if "max_epochs" not in parameters:
        assert {"max_steps", "max_epochs"}.isdisjoint(parameters), "both follow from other arguments"
        return
    assert method.max_steps == method.default_steps
    given = METHODS[name](max_epochs=2)
    assert (given.max_steps, given.max_epochs) == (None, 2)
    both = METHODS[name](max_steps=3, max_epochs=2)
    assert (both.max_steps, both.max_epochs) == (3, 2)


def test_without_a_default_the_length_has_to_be_given():
    class Bare(PushingMethod):
        def step(self, host, batch, batch_idx):
            """Not run."""

    with pytest.raises(ValueError, match="max_steps"):
        Bare()
    assert Bare(max_epochs=1).settings["stop"] == "held_out"


def test_what_a_plain_loss_method_is_run_with_is_no_argument():
    parameters = inspect.signature(LossMethod).parameters
    assert {"stop", "check_every", "forget_statistics", "updates"}.isdisjoint(parameters)
    assert (LossMethod.stop, LossMethod.check_every, LossMethod.updates) == (None, 1, None)
    assert "updates" not in FineTune().settings
    assert FineTune().with_updates(PartialUpdates(0.5)).settings["updates"] == PartialUpdates(0.5)


def test_the_root_of_all_takes_nothing():
    assert not inspect.signature(UnlearningMethod).parameters
