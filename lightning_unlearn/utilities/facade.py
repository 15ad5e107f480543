"""A second object on the same state: how a user's module or datamodule is wrapped without being touched.

Composition (`self.model = user_object`) fails where a framework asks the *root* object: hooks that only the user's
class has, names in checkpoints, hyper-parameters, `isinstance` in callbacks, sharding strategies that match names. A
facade is a new object whose class is built on the fly as `(Wrapper, UserClass)` and whose `__dict__` *is* the user's
`__dict__`, the same dict object. There is no child, no prefix and no copied state: what is set on one is seen on the
other. What the wrapper itself needs lives in `__slots__`, so it is in neither the dict, the state dict nor a pickle
of the user's object, and several facades can stand on one object at the same time.

The idiom cannot serve classes that keep state outside `__dict__` (`__slots__` of the user's): they are refused.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, TypeVar

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected

__all__ = ["check_shareable", "facade_class", "on_same_state"]

T = TypeVar("T")
_CLASSES: dict[tuple[type, type], type[Any]] = {}


def on_same_state(cls: type[T], state: dict[str, Any]) -> T:
    """An object of class `cls` that lives on the existing dict `state`; no `__init__` runs.

    >>> class Box: ...
    >>> box = Box(); box.content = 1
    >>> other = on_same_state(Box, box.__dict__); other.content = 2
    >>> box.content
    2
    """
    instance = object.__new__(cls)
    # Past any `__setattr__` of the class: `nn.Module` would look at the value first.
    object.__setattr__(instance, "__dict__", state)
    return instance


def facade_class(wrapper: type, user_cls: type, extra: Mapping[str, Any] | None = None) -> type[Any]:
    """The class `(wrapper, user_cls)` under the user's name, built once for each pair.

    The user's `__qualname__` is kept because Lightning stores a datamodule's state under it. Pickling never looks the
    class up by name: the wrapper's `__reduce_ex__` names `_facade_of`, the wrapper class, instead.

    Args:
        wrapper: Class whose definitions win.
        user_cls: Class of the user's object.
        extra: More definitions for this user's class; read only when the pair is seen for the first time.
    """
    known = _CLASSES.get((wrapper, user_cls))
    if known is None:
        namespace: dict[str, Any] = {
            "__module__": user_cls.__module__,
            "__qualname__": user_cls.__qualname__,
            "__doc__": user_cls.__doc__,
            "_facade_of": wrapper,
            **(extra or {}),
        }
        # `new_class` resolves the metaclass, so a user's ABC stays one.
        known = types.new_class(user_cls.__name__, (wrapper, user_cls), {}, lambda body: body.update(namespace))
        _CLASSES[wrapper, user_cls] = known
    return known


def check_shareable(user_cls: type, name: str) -> None:
    """Refuse a class that keeps state in `__slots__`, which two objects cannot share.

    Raises:
        UnsupportedStrategyError: a class in the hierarchy has non-empty `__slots__`.
    """
    for cls in user_cls.__mro__:
        slots = cls.__dict__.get("__slots__", ())
        named = [slots] if isinstance(slots, str) else list(slots)
        if set(named) - {"__dict__", "__weakref__"}:
            rule = "an object that keeps its state in `__dict__`"
            raise UnsupportedStrategyError(
                expected(name, rule, f"{cls.__qualname__} with __slots__", "Remove the `__slots__` of that class.")
            )
