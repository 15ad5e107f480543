"""The methods by name. A method registers itself; contract tests, `unlearn` and the docs read this table."""

from __future__ import annotations

import inspect
from types import MappingProxyType
from typing import TypeVar

from lightning_unlearn.methods.base import UnlearningMethod
from lightning_unlearn.utilities.checks import expected

__all__ = ["METHODS", "get_method", "register"]

M = TypeVar("M", bound=type[UnlearningMethod])

_methods: dict[str, type[UnlearningMethod]] = {}
METHODS = MappingProxyType(_methods)
"""Read-only view: class name -> class."""


def register(cls: M) -> M:
    """Class decorator: make a concrete method known under its class name.

    Raises:
        TypeError: the class is abstract, does not declare `guarantee`, `cost` and `source`, has no docstring, or its
            `search_space` names what is no argument.
        ValueError: the name is taken.
    """
    undeclared = [name for name in ("guarantee", "cost", "source") if not hasattr(cls, name)]
    if inspect.isabstract(cls) or undeclared or not cls.__doc__:
        raise TypeError(
            expected(cls.__name__, "a concrete, documented method", undeclared or cls, "Declare what is missing.")
        )
    strangers = set(cls.search_space) - set(inspect.signature(cls).parameters)
    if strangers:
        raise TypeError(expected("search_space", f"arguments of {cls.__name__}", sorted(strangers)))
    if cls.__name__ in _methods:
        raise ValueError(expected("name", "unused", cls.__name__, "Rename the class."))
    _methods[cls.__name__] = cls
    return cls


def get_method(name: object) -> type[UnlearningMethod]:
    """Look a method up; case, hyphens and underscores do not matter.

    Raises:
        ValueError: no such method; the message lists all.
        TypeError: not a name.

    >>> get_method("partial-amnesiac").__name__
    'PartialAmnesiac'
    """
    if not isinstance(name, str):
        remedy = "Make an instance of the class: `PartialAmnesiac()`."
        raise TypeError(expected("method", "a method or the name of one", name, remedy))

    def plain(text: str) -> str:
        return text.replace("_", "").replace("-", "").lower()

    for known, cls in _methods.items():
        if plain(known) == plain(name):
            return cls
    raise ValueError(expected("method", f"one of {', '.join(sorted(_methods))}", name))
