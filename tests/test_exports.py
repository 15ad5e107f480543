"""Where users look for names: all that a script needs at the root, what a method's author needs in `methods`."""

import ast
from pathlib import Path

import pytest

import lightning_unlearn
from lightning_unlearn import methods
from lightning_unlearn.methods import METHODS

ADDING = "export it in methods/__init__.py, and name it in the three lists of lightning_unlearn/__init__.py"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_registered_method_is_in_both_places(name):
    assert name in methods.__all__, ADDING
    assert name in lightning_unlearn.__all__, ADDING
    assert getattr(methods, name) is getattr(lightning_unlearn, name) is METHODS[name]


@pytest.mark.parametrize(
    "name",
    [
        *("BatchAdapter", "PartialUpdates", "PlanThresholds", "ProbeThresholds", "Pruning", "UnlearningResult"),
        *("as_batch_adapter", "compare_models", "plan_rewind"),
    ],
)
def test_what_calls_and_methods_take_and_give_is_at_the_root(name):
    assert getattr(lightning_unlearn, name).__name__ == name
    assert name in lightning_unlearn.__all__


@pytest.mark.parametrize(
    "name",
    [
        *("UnlearningMethod", "WeightEdit", "LossMethod", "PushingMethod", "Procedure", "Requirement", "register"),
        *("hyperparameters", "EditContext", "ProcedureContext", "UnlearningHost", "user_loss", "weighted_sum"),
        *("FloatRange", "IntRange", "Choices", "SearchSpace", "save_method", "load_method"),
    ],
)
def test_what_an_author_of_a_method_needs_is_with_the_methods(name):
    assert name in methods.__all__
    assert name not in lightning_unlearn.__all__


def test_the_lists_of_the_root_are_one():
    tree = ast.parse(Path(lightning_unlearn.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(typed.body)
    seen = {
        alias.name: (node.module or "").removeprefix("lightning_unlearn.") for node in imports for alias in node.names
    }
    assert seen == lightning_unlearn._HOMES, "a type checker must see what loads on first use"
    assert {*seen, "__version__"} == set(lightning_unlearn.__all__)
    assert dir(lightning_unlearn) == sorted(lightning_unlearn.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Amnesia'"):
        lightning_unlearn.Amnesia  # noqa: B018
