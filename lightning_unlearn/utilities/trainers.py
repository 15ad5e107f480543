"""A Trainer that never runs, one that is to end, and callbacks that belong to one Trainer alone."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar, overload

from lightning import Callback, LightningModule, Trainer

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected

__all__ = ["end_fit", "idle_trainer", "private_callbacks"]

T = TypeVar("T", bound=Trainer)


@overload
def idle_trainer(module: LightningModule) -> Trainer: ...
@overload
def idle_trainer(module: LightningModule, kind: type[T]) -> T: ...
def idle_trainer(module: LightningModule, kind: type[Any] = Trainer) -> Any:
    """A quiet Trainer connected to `module`, for code that asks a Trainer about it or has it write a checkpoint.

    The module's own `trainer` attribute is left alone; set and restore it around the use.

    Args:
        module: The module.
        kind: Class of the Trainer.
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "GPU available but not used", for a Trainer that uses nothing
            trainer = kind(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    finally:
        logger.setLevel(level)
    trainer.strategy.connect(module)
    return trainer


def end_fit(trainer: Trainer) -> None:
    """End a fit after the step under way, whatever `min_steps` and `min_epochs` its Trainer was built with."""
    trainer.fit_loop.min_epochs = 0
    trainer.fit_loop.epoch_loop.min_steps = None
    trainer.should_stop = True


def private_callbacks(trainer: Trainer, shared: Sequence[Callback] = ()) -> None:
    """Copy a fresh Trainer's callbacks, so that several fits with the same ones start from the state they were given.

    Args:
        trainer: The Trainer.
        shared: Callbacks that stay the objects they are.

    Raises:
        UnsupportedStrategyError: one of the others cannot be copied.
    """
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    try:
        callbacks[:] = copy.deepcopy(callbacks, {id(one): one for one in shared})
    except (TypeError, RuntimeError, ValueError, copy.Error) as error:
        rule, remedy = "with callbacks that can be copied, one for every fit", "Leave the others out."
        raise UnsupportedStrategyError(expected("trainer", rule, str(error), remedy)) from error
