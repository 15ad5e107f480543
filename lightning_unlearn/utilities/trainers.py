"""A Trainer that never runs, and one that is to end."""

from __future__ import annotations

import logging
import warnings
from typing import Any, TypeVar, overload

from lightning import LightningModule, Trainer

__all__ = ["end_fit", "idle_trainer"]

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
