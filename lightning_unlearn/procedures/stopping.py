"""What ends a pass before its limits: a forget loss that has reached that of held-out data, and a loss that broke."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import UnlearningWarning
from lightning_unlearn.methods.loss_method import LossMethod, PushingMethod
from lightning_unlearn.modules.probe import probe_loss

__all__ = ["HeldOutStop", "NonFiniteStop", "PassStops"]

_SAMPLES = 500


class HeldOutStop(Callback):
    """Ends a pass once the loss on the forget data is no longer below that on held-out data.

    Both are the mean of the user's own training loss in eval mode, looked at before the first step and then after every
    `every` steps, or at the end of some epochs. A module without such a loss (manual optimization, a step that skips
    every batch) is never stopped.

    Args:
        forget: The data to forget, in evaluation form.
        held_out: Data the model was not trained on, in evaluation form.
        every: Steps between two looks; `None` looks at the end of epochs.
        epochs: The epochs to look at the end of; `None` for all.
        max_samples: At most so many samples of each.

    Attributes:
        losses: Forget and held-out loss at the last look; `None` before it.
        stopped_at: Steps after which the pass was ended, `None` where it was not.
    """

    def __init__(
        self,
        forget: DataLoader[Any],
        held_out: DataLoader[Any],
        *,
        every: int | None = 5,
        epochs: Collection[int] | None = None,
        max_samples: int = _SAMPLES,
    ) -> None:
        self._forget = forget
        self._held_out = held_out
        self._every = every
        self._epochs = epochs
        self._max_samples = max_samples
        self._looked_at = -1
        self.losses: tuple[float, float] | None = None
        self.stopped_at: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before the first step."""
        self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look after every few steps."""
        # Under accumulation several batches end at the same step.
        if self._every and trainer.global_step % self._every == 0 and trainer.global_step != self._looked_at:
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look after an epoch, where steps are not counted."""
        if self._every is None and (self._epochs is None or trainer.current_epoch in self._epochs):
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        self._looked_at = trainer.global_step
        found = [probe_loss(module, one, max_samples=self._max_samples) for one in (self._forget, self._held_out)]
        forget, held_out = found
        reached = forget is not None and held_out is not None and forget >= held_out
        if forget is not None and held_out is not None:
            self.losses = forget, held_out
        # Every process looks at the same samples with the same weights; decided together all the same.
        if trainer.strategy.reduce_boolean_decision(reached, all=True):
            self.stopped_at = trainer.global_step
            trainer.should_stop = True


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
            trainer.should_stop = True


class PassStops:
    """What may end one pass of a method early, and the sentences about it.

    Args:
        method: The method.
        data: The split data.

    Attributes:
        callbacks: To be added to the pass's Trainer.
        notes: What is to be said before the pass; warned of as well.
    """

    def __init__(self, method: LossMethod, data: UnlearningDataModule) -> None:
        self._name = method.name
        self._finite = NonFiniteStop()
        self._held_out: HeldOutStop | None = None
        self.notes: list[str] = []
        if method.stop == "held_out":
            held_out = data.val_loader()
            if held_out is None:
                self._warn(
                    f"{method.name} runs its fixed number of steps, because there are no validation data whose loss "
                    "would say when to stop: data that were never memorised are then pushed too far. Give validation "
                    'data (`data={"train": ..., "val": ...}`, or a datamodule with them), or say `stop=None`.'
                )
            else:
                every = method.check_every if isinstance(method, PushingMethod) else 1
                epochs = [epoch for epoch, parts in enumerate(method.schedule or ()) if "retain" in parts] or None
                self._held_out = HeldOutStop(data.forget_loader(), held_out, every=every, epochs=epochs)
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
        if stop is None or stop.stopped_at is None or stop.losses is None:
            return []
        when = f"after {stop.stopped_at} steps" if stop.stopped_at else "before the first step"
        forget, held_out = stop.losses
        seen = f"the loss on the forget data ({forget:.3f}) had reached that on validation data ({held_out:.3f})"
        return [f"{self._name} was ended {when}: {seen}, as in a model that never saw them."]

    def _warn(self, text: str) -> None:
        self.notes.append(text)
        warnings.warn(text, UnlearningWarning, stacklevel=2)
