"""Fresh Trainers for a pass, from whatever the user gave: arguments, a factory, or one unused Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import Strategy

from lightning_unlearn.exceptions import MissingRequirementError, UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected

__all__ = ["TrainerArgument", "TrainerSource", "add_callbacks", "check_unmonitored"]

TrainerArgument: TypeAlias = Mapping[str, Any] | Callable[..., Trainer] | Trainer | None

# A pass is an errand, not a training: it leaves no logs and no checkpoints unless the user asks for them.
_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
_LIMITS = ("max_steps", "max_epochs", "min_steps", "min_epochs", "max_time")


class TrainerSource:
    """Makes one fresh Trainer per stage of a pass.

    Args:
        trainer: Arguments of `Trainer`, a callable that takes overriding keyword arguments and returns a fresh
            Trainer, or one Trainer that was never run (good for one stage). `None` takes quiet defaults on one device.
        callbacks: Added to every Trainer that is made.

    Raises:
        TypeError: something else was given.
        ValueError: the Trainer has already run; it would run zero steps and change nothing.
    """

    def __init__(self, trainer: TrainerArgument, callbacks: Sequence[Callback] = ()) -> None:
        if trainer is not None and not isinstance(trainer, (Mapping, Trainer)) and not callable(trainer):
            raise TypeError(expected("trainer", "Trainer arguments, a factory or a fresh Trainer", trainer))
        if isinstance(trainer, Trainer):
            _check_fresh(trainer)
        self._given = trainer
        self._spent = False
        self._always = tuple(callbacks)

    @property
    def arguments(self) -> Mapping[str, Any] | None:
        """The user's Trainer arguments, where arguments were given."""
        return self._given if isinstance(self._given, Mapping) else None

    def check_stages(self, fits: int) -> None:
        """Refuse before any work when one Trainer was given for several fits."""
        if isinstance(self._given, Trainer) and fits > 1:
            raise ValueError(
                expected("trainer", f"arguments or a factory, for {fits} fits are planned", "one Trainer instance")
            )

    def check_length(self, method: str) -> None:
        """Refuse a training of no given length, which would run for Lightning's default of 1000 epochs.

        Raises:
            MissingRequirementError: neither arguments with a limit, nor a factory or a Trainer.
        """
        arguments = {} if self._given is None else self.arguments
        if arguments is not None and not any(arguments.get(name) for name in (*_LIMITS, "fast_dev_run")):
            remedy = "Pass the length of the original training, such as trainer={'max_epochs': 20}."
            rule = f"given with a limit, for {method} trains from the start"
            raise MissingRequirementError(expected("trainer", rule, self._given, remedy))

    def check_callbacks(self) -> None:
        """Refuse callbacks that wait for a metric, in a stage that runs a few steps and validates nothing.

        Raises:
            ValueError: the arguments, or the Trainer, have such callbacks (early stopping, checkpoints of the best).
        """
        if self.arguments is not None:
            check_unmonitored(_callbacks_in(self.arguments))
        elif isinstance(self._given, Trainer):
            check_unmonitored(vars(self._given)["callbacks"])

    def make(self, *, callbacks: Sequence[Callback] = (), **overrides: Any) -> Trainer:
        """Build a fresh Trainer; `overrides` replace the user's arguments, `callbacks` are added to the user's.

        Raises:
            MissingRequirementError: a single Trainer instance was used up by an earlier stage, or a limit was asked
                for that the given instance does not have.
            UnsupportedStrategyError: a strategy among the arguments cannot be copied.
            ValueError: the factory returned a Trainer that has already run.
        """
        added = [*callbacks, *self._always]
        if isinstance(self._given, Trainer):
            return self._once(self._given, added, overrides)
        if self._given is None or isinstance(self._given, Mapping):
            arguments = {**_QUIET, **({"devices": 1} if self._given is None else self._given)}
            if any(overrides.get(key) is not None for key in _LIMITS):
                # A limit for the pass replaces all of the training's limits.
                arguments = {key: value for key, value in arguments.items() if key not in _LIMITS}
            users = _callbacks_in(arguments)
            arguments.pop("callbacks", None)
            if any(isinstance(callback, Checkpoint) for callback in users) and not self._names("enable_checkpointing"):
                del arguments["enable_checkpointing"]
            return Trainer(**{**_private(arguments), **overrides}, callbacks=[*users, *added])
        trainer = self._given(**overrides)
        _check_fresh(trainer)
        add_callbacks(trainer, added)
        return trainer

    def _names(self, argument: str) -> bool:
        return self.arguments is not None and argument in self.arguments

    def _once(self, trainer: Trainer, added: list[Callback], overrides: Mapping[str, Any]) -> Trainer:
        if self._spent:
            raise MissingRequirementError(
                expected("trainer", "arguments or a factory, for another fit is needed", "one Trainer, used already")
            )
        differing = {
            key: value
            for key, value in overrides.items()
            if value is not None and key in ("max_steps", "max_epochs") and getattr(trainer, key) != value
        }
        if differing:
            text = ", ".join(f"{key}={value}" for key, value in differing.items())
            raise MissingRequirementError(
                expected("trainer", f"built with {text}, or given as arguments or a factory", "a Trainer without it")
            )
        self._spent = True
        add_callbacks(trainer, added)
        return trainer


def add_callbacks(trainer: Trainer, added: Sequence[Callback]) -> None:
    """Add callbacks to a Trainer that exists already."""
    # The list is a plain attribute that Lightning documents but does not annotate.
    users: list[Callback] = vars(trainer)["callbacks"]
    users.extend(added)


def _private(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with a copy of a strategy that was given as an object: one serves one Trainer."""
    strategy = arguments.get("strategy")
    if not isinstance(strategy, Strategy):
        return dict(arguments)
    try:
        return {**arguments, "strategy": copy.deepcopy(strategy)}
    except (TypeError, RuntimeError, ValueError, copy.Error) as error:
        rule, remedy = "one that can be copied for each Trainer", "Pass a function that builds the Trainer instead."
        raise UnsupportedStrategyError(expected("strategy", rule, str(error), remedy)) from error


def _callbacks_in(arguments: Mapping[str, Any]) -> list[Callback]:
    users = arguments.get("callbacks") or []
    return [users] if isinstance(users, Callback) else list(users)


def check_unmonitored(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that wait for a metric.

    Raises:
        ValueError: one of them is early stopping, or a checkpoint of the best model.
    """
    kinds = (EarlyStopping, ModelCheckpoint)
    for callback in callbacks:
        if isinstance(callback, kinds) and callback.monitor is not None:
            got = f"{type(callback).__name__}(monitor={callback.monitor!r})"
            rule = "without callbacks that monitor a metric, for a pass takes few steps and validates nothing"
            raise ValueError(expected("trainer", rule, got, "Leave them out, and validate the result afterwards."))


def _check_fresh(trainer: Trainer) -> None:
    if trainer.global_step > 0 or trainer.current_epoch > 0 or trainer.state.finished:
        raise ValueError(
            expected(
                "trainer",
                "fresh",
                f"a Trainer that has already run ({trainer.global_step} steps)",
                "Pass the arguments of a Trainer as a dict, or a function that builds one.",
            )
        )
