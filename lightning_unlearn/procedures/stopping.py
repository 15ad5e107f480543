"""What ends a pass before its limits: a forget loss that has reached that of held-out data, and a loss that broke."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import UnlearningWarning, UnsupportedStrategyError
from lightning_unlearn.methods.loss_method import LossMethod
from lightning_unlearn.procedures.held_out_stop import HeldOutStop
from lightning_unlearn.procedures.reference import HeldOutReference
from lightning_unlearn.utilities.batch_adapter import BatchAdapter
from lightning_unlearn.utilities.trainers import end_fit

__all__ = ["NonFiniteStop", "PassStops", "held_out_data"]


class NonFiniteStop(Callback):
    """Ends a pass whose loss has become infinite or NaN, on all processes where it has on one.

    Attributes:
        stopped_at: Steps after which that was seen, `None` where it was not.
    """

    def __init__(self) -> None:
        self.stopped_at: int | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the step's loss."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        broken = isinstance(loss, Tensor) and not bool(torch.isfinite(loss).all())
        if trainer.strategy.reduce_boolean_decision(broken, all=False):
            self.stopped_at = trainer.global_step
            end_fit(trainer)


def held_out_data(method: LossMethod, data: UnlearningDataModule) -> DataLoader[Any] | None:
    """The validation data that say when a method stops; `None` where there are none, or it asks for none.

    Raises:
        UnsupportedStrategyError: several loaders, or an iterable dataset.
    """
    if method.stop is None:
        return None
    try:
        return data.val_loader()
    except UnsupportedStrategyError as error:
        text = f"{method.name} looks at validation data to see when to stop. {error} Or say `stop=None`: a fixed number"
        raise UnsupportedStrategyError(f"{text} of steps.") from error


class PassStops:
    """What may end one pass of a method early, and the sentences about it.

    Args:
        method: The method.
        data: The split data.
        adapter: Tells the classes of batches.

    Attributes:
        callbacks: To be added to the pass's Trainer.
        notes: What is to be said before the pass; warned of as well.
    """

    def __init__(self, method: LossMethod, data: UnlearningDataModule, adapter: BatchAdapter | None = None) -> None:
        self._name = method.name
        self._finite = NonFiniteStop()
        self._held_out: HeldOutStop | None = None
        self.notes: list[str] = []
        if method.stop is not None:
            held_out = held_out_data(method, data)
            if held_out is None:
                self._warn(
                    f"{method.name} runs its fixed number of steps, because there are no validation data whose loss "
                    "would say when to stop: data that were never memorised are then pushed too far. Give validation "
                    'data (`data={"train": ..., "val": ...}`, or a datamodule with them), or say `stop=None`.'
                )
            else:
                epochs = [epoch for epoch, parts in enumerate(method.schedule or ()) if "retain" in parts] or None
                loaders = data.forget_loader(), held_out, data.retain_loader()
                self._held_out = HeldOutStop(
                    *loaders, rule=method.stop, adapter=adapter, every=method.check_every, epochs=epochs
                )
        self.callbacks: list[Callback] = [self._finite, *([self._held_out] if self._held_out is not None else [])]

    @property
    def broken(self) -> bool:
        """Whether the loss became infinite or NaN."""
        return self._finite.stopped_at is not None

    @property
    def ended_early(self) -> bool:
        """Whether one of them ended the pass."""
        return self.broken or (self._held_out is not None and self._held_out.stopped_at is not None)

    def reasons(self) -> list[str]:
        """Why the pass ended early, if it did; a loss that broke is warned of as well."""
        if self.broken:
            text = (
                f"The loss of {self._name} was not finite after {self._finite.stopped_at} steps; the pass ended there."
            )
            warnings.warn(text, UnlearningWarning, stacklevel=2)
            return [text]
        stop = self._held_out
        return [] if stop is None or stop.reference is None else list(self._of_held_out(stop, stop.reference))

    def _of_held_out(self, stop: HeldOutStop, before: HeldOutReference) -> Iterator[str]:
        if stop.rule == "held_out" and not before.is_target:
            why = "they are whole classes"
            if before.above:
                why = f"the loss on them ({before.forget:.3f}) was above it ({before.held_out:.3f}) to begin with"
            yield (
                f"The held-out loss was no target for {self._name} on these forget data, because {why}: it pushed on "
                "as far as its steps and the other data allowed."
            )
        if stop.halvings:
            yield (
                f"The learning rate of {self._name} was halved {stop.halvings} times, because its first step damaged "
                "the model and was taken back: give a smaller `lr_scale`."
            )
        if stop.damage is not None:
            yield (
                f"{self._name} was ended by step {stop.stopped_at}, which was taken back: {stop.damage}. A smaller "
                "`lr_scale` may go further."
            )
        elif stop.stopped_at is not None:
            when = f"after {stop.stopped_at} steps" if stop.stopped_at else "before the first step"
            yield (
                f"{self._name} was ended {when}: the loss on the forget data ({stop.forget_loss:.3f}) had reached that "
                f"on held-out data ({before.held_out:.3f}), as in a model that never saw them."
            )
            if not stop.stopped_at:
                yield 'If held-out data say nothing about them (wrong labels, a trigger), say `stop="retain"`.'

    def _warn(self, text: str) -> None:
        self.notes.append(text)
        warnings.warn(text, UnlearningWarning, stacklevel=2)
