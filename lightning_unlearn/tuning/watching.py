"""Looks at a trial's pass while it is under way, so that one without hope can be ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_unlearn.methods.base import UnlearningMethod
from lightning_unlearn.methods.loss_method import LossMethod

__all__ = ["Look", "PassWatch"]

Look = Callable[[int, LightningModule], None]
"""(percent of the pass, module) -> may raise what ends the trial."""


class PassWatch(Callback):
    """Shows the module after each quarter of a pass but the last.

    Where a method goes over the forget data in epochs of their own, the model is in disorder until the retain data
    follow; it is shown at the ends of epochs with retain data alone.

    Args:
        method: What is run; only passes of a `LossMethod` have steps to look between.
        look: Called with the share of the pass in percent, and the module.
        marks: After which percentages.
    """

    def __init__(self, method: UnlearningMethod, look: Look | None, marks: Sequence[int] = (25, 50, 75)) -> None:
        self._schedule = method.schedule if isinstance(method, LossMethod) else None
        self._look = look if isinstance(method, LossMethod) else None
        self._left = sorted(marks)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, where a mark has been passed."""
        if self._schedule is None:
            self._passed(trainer, pl_module, (batch_idx + 1) / trainer.num_training_batches)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, where a mark has been passed and the epoch was over retain data."""
        if self._schedule is None:
            return
        epoch = min(trainer.current_epoch, len(self._schedule) - 1)
        if "retain" in self._schedule[epoch]:
            self._passed(trainer, pl_module, 1.0)

    def _passed(self, trainer: Trainer, module: LightningModule, of_epoch: float) -> None:
        shares = [0.0]
        if trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            shares.append((trainer.current_epoch + of_epoch) / trainer.max_epochs)
        passed = [mark for mark in self._left if mark <= 100 * max(shares) < 100]
        if passed and self._look is not None:
            self._left = [mark for mark in self._left if mark > passed[-1]]
            self._look(passed[-1], module)
