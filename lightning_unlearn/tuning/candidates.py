"""The methods of a study, and how each is varied."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lightning_unlearn.methods.base import UnlearningMethod
from lightning_unlearn.methods.config import as_method
from lightning_unlearn.methods.search_space import Choices, Dimension, FloatRange, IntRange, SearchSpace
from lightning_unlearn.utilities.checks import expected

__all__ = ["Candidate", "Candidates", "Methods"]

Named: TypeAlias = UnlearningMethod | str | os.PathLike[str]
Methods: TypeAlias = Named | Sequence[Named] | Mapping[str, Named]
"""One method, several, or label -> method; a method may be its name, or a file that `save_method` wrote."""

_METHOD = "method"


class Candidate:
    """One method of a study.

    Args:
        label: What it is called in the study.
        method: With the values that are not varied, and those of the first trial.
        space: What is varied, by default what the method declares.

    Raises:
        ValueError: nothing is varied, or a value of `method` is not in its range.
    """

    def __init__(self, label: str, method: UnlearningMethod, space: SearchSpace | None = None) -> None:
        self.label, self.method = label, method
        self.space: dict[str, Dimension] = dict(method.search_space if space is None else space)
        if not self.space:
            remedy = "Leave it out, or declare `search_space` in its class."
            raise ValueError(expected("methods", "methods that declare what to vary", method, remedy))
        arguments = method.arguments
        self.defaults = {name: arguments[name] for name in self.space}
        for name, value in self.defaults.items():
            if value not in self.space[name]:
                rule = f"in {self.space[name]}, for it is the first that is tried"
                raise ValueError(expected(f"{label}.{name}", rule, value, "Widen the search space."))

    def varied(self, settings: Mapping[str, Any]) -> UnlearningMethod:
        """The method with other values."""
        return self.method.with_hyperparameters(**settings)


class Candidates:
    """All methods of a study, and their settings as Optuna's parameters: `"method"` and `"Scrub.lr_scale"`.

    Args:
        methods: One, several, or label -> method.
        spaces: Label -> what is varied instead of what the method declares.

    Raises:
        ValueError: none, two of one label, spaces of methods that are not there, or as for `Candidate`.
    """

    def __init__(self, methods: Methods, spaces: Mapping[str, SearchSpace] | None = None) -> None:
        found = _labelled(methods)
        spaces = dict(spaces or {})
        if unknown := sorted(set(spaces) - {label for label, _ in found}):
            raise ValueError(expected("spaces", f"of {', '.join(label for label, _ in found)}", unknown))
        self.of = {label: Candidate(label, method, spaces.get(label)) for label, method in found}
        if len(self.of) < len(found) or not found:
            got = [label for label, _ in found]
            remedy = "Give a mapping of labels to methods."
            raise ValueError(expected("methods", "at least one, with labels of their own", got, remedy))

    def signature(self) -> dict[str, Any]:
        """What another process has to have as well, in plain data."""
        return {
            label: {
                "method": one.method.name,
                "settings": {name: _told(value) for name, value in one.method.settings.items()},
                "space": {name: str(dimension) for name, dimension in one.space.items()},
            }
            for label, one in self.of.items()
        }

    def parameters(self, label: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's parameters of some settings."""
        own = {f"{label}.{name}": value for name, value in settings.items()}
        return own if len(self.of) == 1 else {_METHOD: label, **own}

    def suggested(self, trial: Any) -> tuple[str, dict[str, Any]]:
        """The method and the settings that Optuna suggests for a trial."""
        labels = list(self.of)
        label = labels[0] if len(labels) == 1 else trial.suggest_categorical(_METHOD, labels)
        space = self.of[label].space
        return label, {name: _suggested(trial, f"{label}.{name}", dim) for name, dim in space.items()}

    def read(self, parameters: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
        """The method and the settings of Optuna's parameters; `None` where a killed process left some out."""
        label = parameters.get(_METHOD, next(iter(self.of)))
        names = {name: f"{label}.{name}" for name in self.of[label].space}
        if not parameters.keys() >= set(names.values()):
            return None
        return label, {name: parameters[parameter] for name, parameter in names.items()}


def _labelled(methods: Methods) -> list[tuple[str, UnlearningMethod]]:
    if isinstance(methods, Mapping):
        return [(label, as_method(method)) for label, method in methods.items()]
    several = [methods] if isinstance(methods, UnlearningMethod | str | os.PathLike) else list(methods)
    made = [as_method(method) for method in several]
    return [(method.name, method) for method in made]


def _told(value: Any) -> Any:
    """A setting as every process tells it: of an object, what it is called, since its address differs."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_told(one) for one in value]
    return getattr(value, "__qualname__", type(value).__qualname__)


def _suggested(trial: Any, name: str, dimension: Dimension) -> Any:
    match dimension:
        case FloatRange():
            return trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
        case IntRange():
            return trial.suggest_int(name, dimension.low, dimension.high, log=dimension.log)
        case Choices():
            return trial.suggest_categorical(name, dimension.options)
