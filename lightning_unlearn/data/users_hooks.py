"""Hooks of a wrapped datamodule: they run on the user's own object, adapted where a batch has parts."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

from lightning import LightningDataModule

__all__ = ["PartwiseHook", "StageHook", "TrainLoaders", "UsersHook", "inherited", "owned"]


def inherited(hook: Callable[..., Any], name: str) -> bool:
    """Whether a bound hook is Lightning's own, so that the user has nothing there."""
    return getattr(hook, "__func__", None) is getattr(LightningDataModule, name)


F = TypeVar("F", bound=Callable[..., Any])


class _Owned:
    """A method that an attribute of the same name on the user's object does not hide: a data descriptor."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any | None, owner: type) -> Any:
        return self.function if instance is None else types.MethodType(self.function, instance)

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = value  # the user's attribute, for the user's code


def owned(function: F) -> F:
    """Mark a method of a wrapper whose name a user may well have given to an attribute, such as `test_loader`."""
    return cast(F, _Owned(function))


class UsersHook:
    """A hook that runs on the user's own object, so the user's code never meets the names of the wrapper.

    What is returned is the user's bound method (or the replacement that `from_datasets` puts on the instance), so
    Lightning's question whether a hook is overridden is answered for the user.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any | None, owner: type) -> Any:
        if instance is None:
            return getattr(LightningDataModule, self.name)
        return self.adapted(instance, getattr(instance._users, self.name))

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = value  # as if it were set on the user's object: the dict is theirs

    def adapted(self, instance: Any, hook: Callable[..., Any]) -> Any:
        """What stands in for `hook`, the user's bound method."""
        return hook


class PartwiseHook(UsersHook):
    """A batch-transfer hook of the user's, applied to each part of a training batch."""

    def adapted(self, instance: Any, hook: Callable[..., Any]) -> Any:
        """What stands in for `hook`, the user's bound method."""
        if inherited(hook, self.name):
            return hook

        @functools.wraps(hook)
        def partwise(batch: Any, *args: Any, **kwargs: Any) -> Any:
            settings = instance._settings
            if not settings.plain and isinstance(batch, dict) and batch and set(batch) <= set(settings.parts):
                return {part: hook(piece, *args, **kwargs) for part, piece in batch.items()}
            return hook(batch, *args, **kwargs)

        return partwise


class StageHook(UsersHook):
    """`setup` or `teardown` of the user's, remembered, so that loaders outside a Trainer set up once and not twice."""

    def adapted(self, instance: Any, hook: Callable[..., Any]) -> Any:
        """What stands in for `hook`, the user's bound method."""
        done = instance._settings.done

        @functools.wraps(hook)
        def remembered(stage: str | None = None) -> None:
            hook(stage=stage)
            stage_name = str(getattr(stage, "value", stage))  # a Trainer passes its enum
            if self.name == "setup":
                done.add(stage_name)
            elif not inherited(hook, self.name):
                done.discard(stage_name)

        return remembered


class TrainLoaders(UsersHook):
    """The training loaders of the declared parts, in place of the user's one."""

    def adapted(self, instance: Any, hook: Callable[..., Any]) -> Any:
        """What stands in for `hook`, the user's bound method."""
        return instance._plain_retain_loader if instance._settings.plain else instance._part_loaders
