"""What penalties on a training have in common: a weight with a schedule, a place in the loss, and a line in the log."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_unlearn.callbacks.loss_terms import add_loss_term
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import check_positive, check_positive_int, expected

__all__ = ["Penalty", "PenaltySchedule", "divided_every"]

PenaltySchedule: TypeAlias = Callable[[Trainer], float]
"""What the weight of a penalty is multiplied with, from the Trainer (its `current_epoch`, its `global_step`)."""


class divided_every:  # noqa: N801  # used as a function
    """A schedule that divides the weight by a number after every so many epochs, as the code of Thudi et al. does.

    Args:
        epochs: Number of epochs of one weight.
        by: What it is divided by after each of them.

    Raises:
        ValueError: `epochs` is no positive integer, or `by` is not positive.

    >>> from types import SimpleNamespace
    >>> schedule = divided_every(10, by=2.0)
    >>> [schedule(SimpleNamespace(current_epoch=epoch)) for epoch in (0, 9, 10, 25)]
    [1.0, 1.0, 0.5, 0.25]
    """

    def __init__(self, epochs: int, *, by: float) -> None:
        self.epochs, self.by = check_positive_int("epochs", epochs), check_positive("by", by)

    def __call__(self, trainer: Trainer) -> float:
        """The factor in the Trainer's current epoch."""
        return float(self.by ** -(trainer.current_epoch // self.epochs))


class Penalty(Callback):
    """Adds a term to the loss of every training step; not in validation, and the module is not changed.

    Args:
        weight: What the term is multiplied with. Where it is zero nothing is computed or added: the training is
            bitwise that without the callback.
        schedule: Factor of the weight, asked before every step.
        name: Name of the term in the log, where its value stands next to the user's loss; `None` for no log.

    Raises:
        ValueError: `weight` is negative or not finite.
    """

    functional_form: str
    """What a user calls where the callback cannot be used."""

    def __init__(self, weight: float, *, schedule: PenaltySchedule | None, name: str | None) -> None:
        super().__init__()
        self._weight = weight
        self._schedule = schedule
        self.name = name
        self._fit: tuple[Trainer, LightningModule] | None = None
        self._remove: Callable[[], None] | None = None

    @abstractmethod
    def penalty(self, weight: float) -> Tensor:
        """The term of the step that has just been watched: a differentiable scalar, `weight` already in it."""

    def watching(self) -> AbstractContextManager[Any]:
        """Around the user's step."""
        return nullcontext()

    def current_weight(self, trainer: Trainer) -> float:
        """The weight by the schedule.

        Raises:
            ValueError: the schedule gives a factor that is negative or not finite.
        """
        factor = 1.0 if self._schedule is None else check_positive("schedule", self._schedule(trainer), zero=True)
        return self._weight * factor

    def term(self) -> Tensor | None:
        """The term, logged; `None` where its weight is zero."""
        if self._fit is None:
            return None
        trainer, module = self._fit
        weight = self.current_weight(trainer)
        added = self.penalty(weight) if weight > 0 else None
        if self.name is not None and _may_log(trainer, module):
            module.log(self.name, 0.0 if added is None else added.detach(), on_step=True, on_epoch=False)
            if self._schedule is not None:
                module.log(f"{self.name}_weight", weight, on_step=True, on_epoch=False)
        return added

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work.

        Raises:
            UnsupportedStrategyError: the module is optimized manually.
        """
        if stage == "fit":
            self._uninstall()
            self._check(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the term into the step: after everything that may build, shard or compile the module."""
        self._check(pl_module)
        self._fit = (trainer, pl_module)
        self._remove = add_loss_term(pl_module, self)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._uninstall()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        if stage == "fit":
            self._uninstall()

    def _check(self, module: LightningModule) -> None:
        if not module.automatic_optimization:
            rule = "optimized automatically: a step that optimizes by itself returns no loss to add to"
            remedy = f"Add `{self.functional_form}` to your loss, in the step."
            raise UnsupportedStrategyError(expected("model", rule, "manual optimization", remedy))

    def _uninstall(self) -> None:
        if self._remove is not None:
            self._remove()
        self._fit = self._remove = None


def _may_log(trainer: Trainer, module: LightningModule) -> bool:
    """Only within a step, since others look at the loss as well; and not where the Trainer warns of every log."""
    return getattr(module, "_current_fx_name", None) == "training_step" and not trainer.barebones
