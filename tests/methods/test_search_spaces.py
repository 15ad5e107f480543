"""What every method says tuning may vary, and making one anew with other values."""

import copy
import inspect
import math

import pytest

from lightning_unlearn.methods import (
    METHODS,
    FineTune,
    GradientAscent,
    LossMethod,
    NegGradPlus,
    PartialAmnesiac,
    PartialGradientAscent,
    PartialUpdates,
    Rewind,
    SalUn,
    Scrub,
    Sisa,
    UnlearningMethod,
    hyperparameters,
    register,
)
from lightning_unlearn.methods.search_space import Choices, FloatRange, IntRange

NAMES = sorted(METHODS)
# Exact ones, and those that approximate the run without the samples: they have formulas and costs to choose, but
# nothing that gives up utility for forgetting.
NOTHING_TO_TUNE = {"DeltaGrad", "Retrain", "Rewind", "Sisa", "UnrolledInfluence"}


def value_of(method, name):
    return method.settings[name] if name in method.settings else getattr(method, name)


def middle(dimension):
    if isinstance(dimension, Choices):
        return dimension.options[len(dimension.options) // 2]
    value = math.sqrt(dimension.low * dimension.high) if dimension.log else (dimension.low + dimension.high) / 2
    return round(value) if isinstance(dimension, IntRange) else value


def ends(dimension):
    return dimension.options if isinstance(dimension, Choices) else (dimension.low, dimension.high)


def corners(space):
    """All lows, all highs, and every end or option with either."""
    for base in (0, -1):
        start = {name: ends(dimension)[base] for name, dimension in space.items()}
        yield start
        yield from ({**start, name: end} for name, dimension in space.items() for end in ends(dimension))


@pytest.mark.parametrize("name", NAMES)
def test_there_is_something_to_tune_where_forgetting_costs_utility(name):
    assert bool(METHODS[name].search_space) == (name not in NOTHING_TO_TUNE)
    assert len(METHODS[name].search_space) <= 5


@pytest.mark.parametrize("name", NAMES)
def test_what_is_tuned_are_arguments_and_the_default_is_among_them(name):
    method = METHODS[name]()
    for argument, dimension in method.search_space.items():
        assert argument in inspect.signature(METHODS[name]).parameters
        assert isinstance(dimension, FloatRange | IntRange | Choices)
        assert value_of(method, argument) in dimension, argument


@pytest.mark.parametrize("name", NAMES)
def test_every_corner_is_a_method(name):
    method = METHODS[name]()
    for corner in corners(method.search_space):
        changed = method.with_hyperparameters(**corner)
        assert {argument: value_of(changed, argument) for argument in corner} == corner
        assert METHODS[name](**corner).settings == changed.settings


@pytest.mark.parametrize("name", NAMES)
def test_a_step_costs_at_most_some_times_the_default(name):
    for argument, dimension in METHODS[name].search_space.items():
        if isinstance(dimension, IntRange):
            assert dimension.high <= 4 * value_of(METHODS[name](), argument)


@pytest.mark.parametrize("name", NAMES)
def test_made_anew_with_other_values_and_back(name):
    method = METHODS[name]()
    before = copy.copy(method.settings)
    same = method.with_hyperparameters()
    assert same is not method
    assert same.settings == method.settings
    assert same.arguments == method.arguments
    values = {argument: middle(dimension) for argument, dimension in method.search_space.items()}
    changed = method.with_hyperparameters(**values)
    assert type(changed) is type(method)
    for argument, value in values.items():
        assert value_of(changed, argument) == value
        assert value in method.search_space[argument]
    back = changed.with_hyperparameters(**{argument: value_of(method, argument) for argument in values})
    assert back.settings == method.settings == before


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_name_is_one_sentence(name):
    with pytest.raises(ValueError, match=rf"hyper-parameters of {name} .*\['strength'\]"):
        METHODS[name]().with_hyperparameters(strength=1)


def test_a_value_that_the_method_refuses_is_refused():
    with pytest.raises(ValueError, match="msteps"):
        Scrub().with_hyperparameters(msteps=4)
    with pytest.raises(ValueError, match="`keep`"):
        PartialAmnesiac().with_hyperparameters(keep=0.0)


def test_everything_else_is_kept():
    def factory(parameters):
        raise NotImplementedError

    method = NegGradPlus(max_epochs=2, optimizer=factory, stop="retain", check_every=3)
    changed = method.with_hyperparameters(retain_weight=0.8)
    assert {**method.settings, "retain_weight": 0.8} == changed.settings
    assert changed.optimizer is factory
    assert Sisa(module_factory=factory).with_hyperparameters(weights_only=False).module_factory is factory
    assert Rewind(checkpoints="a").with_hyperparameters(order="recorded").checkpoints == ("a",)
    pruned = PartialAmnesiac(keep={"*.weight": 0.5}, prune="sum", mask_seed=3)
    assert pruned.with_hyperparameters(keep=0.1).settings == {**pruned.settings, "keep": 0.1}


def test_a_default_length_gives_way_to_epochs_and_a_given_one_stays():
    def limits(method):
        return method.max_steps, method.max_epochs

    assert limits(FineTune().with_hyperparameters(max_epochs=2)) == (None, 2)
    assert limits(FineTune().with_hyperparameters(lr_scale=0.1).with_hyperparameters(max_epochs=2)) == (None, 2)
    assert limits(FineTune(max_steps=50).with_hyperparameters(max_epochs=2)) == (50, 2)
    assert limits(FineTune(max_epochs=2).with_hyperparameters(lr_scale=0.1)) == (None, 2)
    assert limits(FineTune(max_epochs=2).with_hyperparameters(max_steps=9)) == (9, 2)
    assert limits(Scrub().with_hyperparameters(epochs=4, msteps=1)) == (None, 5)


@pytest.mark.parametrize("method", [SalUn(), PartialGradientAscent()])
def test_partial_updates_are_kept(method):
    restricted = method.with_updates(PartialUpdates(0.3, "cyclic"))
    changed = restricted.with_hyperparameters(lr_scale=0.2)
    assert changed.updates == PartialUpdates(0.3, "cyclic")
    assert changed.lr_scale == 0.2
    assert method.updates != restricted.updates


def test_partial_updates_come_from_the_arguments_unless_they_were_set():
    changed = PartialGradientAscent().with_hyperparameters(fraction=0.5)
    assert changed.updates == PartialUpdates(0.5)
    overruled = PartialGradientAscent().with_updates(PartialUpdates(0.3))
    with pytest.raises(ValueError, match="without effect"):
        overruled.with_hyperparameters(fraction=0.5)


def test_a_form_of_a_method_has_its_space_and_more():
    assert GradientAscent.search_space.items() <= PartialGradientAscent.search_space.items()
    assert FineTune.search_space.items() <= METHODS["L1Sparse"].search_space.items()
    assert "stop" not in METHODS["ScrubR"].search_space


@hyperparameters
class _Bare(LossMethod):
    """A method of a test, with what it was given under names of its own."""

    level: float = 1.0

    def __post_init__(self):
        self.max_steps = 3

    def step(self, host, batch, batch_idx):
        """Not run."""


class _Written(UnlearningMethod):
    """A method of a test that keeps nothing."""

    guarantee, cost, source = "heuristic", "weights only", "test"

    def __init__(self, *, level=1.0, **others):
        if "kept" in others:
            self.level = level


def test_methods_of_others():
    assert _Bare().with_hyperparameters(level=2.0).level == 2.0
    with pytest.raises(TypeError, match=r"level.*Override `arguments`"):
        _Written().with_hyperparameters(level=2.0)
    with pytest.raises(TypeError, match=r"others.*Override `arguments`"):
        _Written(kept=True).with_hyperparameters(level=2.0)

    class Strange(FineTune):
        """Its space names what is no argument."""

        search_space = {"strength": FloatRange(0, 1)}  # noqa: RUF012

    with pytest.raises(TypeError, match=r"arguments of Strange, but got \['strength'\]"):
        register(Strange)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FloatRange(1, 1), "above `low`"),
        (lambda: FloatRange(2, 1), "above `low`"),
        (lambda: FloatRange(0, 1, log=True), "above 0"),
        (lambda: FloatRange(0, math.inf), "finite"),
        (lambda: FloatRange(math.nan, 1), "finite"),
        (lambda: FloatRange(False, 1), "finite"),
        (lambda: FloatRange("0", 1), "finite"),
        (lambda: IntRange(1.0, 2), "integer"),
        (lambda: IntRange(True, 2), "integer"),
        (lambda: IntRange(3, 2), "above `low`"),
        (lambda: IntRange(0, 2, log=True), "above 0"),
        (lambda: Choices(()), "at least two"),
        (lambda: Choices(("a",)), "at least two"),
        (lambda: Choices(("a", "b", "a")), "all different"),
        (lambda: Choices((1, 1.0)), "all different"),
        (lambda: Choices(("a", ["b"])), "strings"),
        (lambda: Choices((0.1, math.nan)), "strings"),
        (lambda: Choices("ab"), "tuple"),
        (lambda: Choices(2), "tuple"),
    ],
)
def test_dimensions_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_lies_in_a_dimension():
    assert 1 in FloatRange(0, 1)
    assert True not in FloatRange(0, 1)
    assert True not in IntRange(0, 1)
    assert None not in FloatRange(0, 1)
    assert math.nan not in FloatRange(0, 1)
    assert 1 not in Choices((True, False))
    assert True not in Choices((1, 2))
    assert None in Choices((None, 0.1))
    assert {"*.weight": 0.1} not in Choices((None, 0.1))
    assert Choices(["a", None]) == Choices(("a", None))
    assert hash(FloatRange(0, 1)) == hash(FloatRange(0.0, 1.0))
