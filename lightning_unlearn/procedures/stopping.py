"""What ends a pass before its limits: a forget loss that has reached that of held-out data, and a loss that broke."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import UnlearningWarning
from lightning_unlearn.methods.loss_method import LossMethod
from lightning_unlearn.modules.probe import ProbeData
from lightning_unlearn.procedures.reference import HeldOutReference, held_out_reference
from lightning_unlearn.utilities.batch_adapter import BatchAdapter

__all__ = ["HeldOutStop", "NonFiniteStop", "PassStops"]

_SAMPLES = 200


class HeldOutStop(Callback):
    """Ends a pass that pushes: where the forget loss has reached that of held-out data, or before the model is damaged.

    Three losses are measured before the first step (the user's own, mean over some samples, in eval mode): on the
    forget data, on held-out data and on the retain data; see `HeldOutReference`. From then on

    - with `rule="held_out"` the pass ends once the forget loss is no longer below the held-out loss that the model
      began with, which may be before the first step. Where that is no target for the forget data, only what follows;
    - a step that damages the model (`HeldOutReference.damage`) is taken back, and ends the pass.

    It is looked at after every `every` steps, from within the optimizer's step, so that a recorder sees what was taken
    back; or at the end of some epochs, where nothing is taken back. A module without such a loss (manual optimization,
    a step that skips every batch) is never stopped.

    Args:
        forget: The data to forget, in evaluation form.
        held_out: Data the model was not trained on, in evaluation form.
        retain: The data to keep, in evaluation form.
        rule: `"held_out"`, or `"retain"` to push as far as the retain data allow.
        adapter: Tells the classes of batches.
        every: Steps between two looks; `None` looks at the end of epochs.
        epochs: The epochs to look at the end of; `None` for all.
        max_samples: At most so many samples of each.

    Attributes:
        reference: The losses before the pass; `None` before it and where there are none.
        forget_loss: The forget loss at the end.
        stopped_at: Steps after which the pass was ended, `None` where it was not.
        damage: Why the last steps were taken back; `None` where they were not.
    """

    def __init__(
        self,
        forget: DataLoader[Any],
        held_out: DataLoader[Any],
        retain: DataLoader[Any],
        *,
        rule: Literal["held_out", "retain"] = "held_out",
        adapter: BatchAdapter | None = None,
        every: int | None = 1,
        epochs: Collection[int] | None = None,
        max_samples: int = _SAMPLES,
    ) -> None:
        self._forget = ProbeData(forget, max_samples=max_samples)
        self._held_out = ProbeData(held_out, max_samples=max_samples)
        self._retain = ProbeData(retain, max_samples=max_samples)
        self.rule = rule
        self._adapter = BatchAdapter() if adapter is None else adapter
        self._every = every
        self._epochs = epochs
        self._steps = 0
        self._good: list[tuple[Tensor, Tensor]] = []
        self._stop_listening: list[Callable[[], None]] = []
        self.reference: HeldOutReference | None = None
        self.forget_loss = math.nan
        self.stopped_at: int | None = None
        self.damage: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before the first step, and from now on behind each."""
        data = (self._forget, self._held_out, self._retain)
        # Every process measures the same samples with the same weights; decided by the first all the same.
        self.reference = trainer.strategy.broadcast(held_out_reference(pl_module, *data, self._adapter))
        if self.reference is None:
            return
        self.forget_loss = self.reference.forget
        self._look(trainer, pl_module)
        if self._every is not None and self.stopped_at is None:
            self._keep(pl_module)
            for optimizer in trainer.optimizers:
                handle = optimizer.register_step_post_hook(lambda *_: self._after_step(trainer, pl_module))
                self._stop_listening.append(handle.remove)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look after an epoch, where steps are not counted."""
        if self._every is None and (self._epochs is None or trainer.current_epoch in self._epochs):
            self._steps = trainer.global_step
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizers, and of the copy of the weights."""
        for stop_listening in self._stop_listening:
            stop_listening()
        self._stop_listening, self._good = [], []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As `on_train_end`."""
        self.on_train_end(trainer, pl_module)

    def _after_step(self, trainer: Trainer, module: LightningModule) -> None:
        self._steps += 1
        if self._every is not None and self._steps % self._every == 0 and self.stopped_at is None:
            self._look(trainer, module)

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        if self.reference is None:
            return
        if self._good:
            now = self._retain.mean_loss(module), self._held_out.mean_loss(module)
            self.damage = trainer.strategy.broadcast(self.reference.damage(*now))
            if self.damage is not None:
                self._take_back()
                self._end(trainer)
                return
        if self.rule == "held_out" and self.reference.is_target:
            forget = self._forget.mean_loss(module)
            self.forget_loss = math.nan if forget is None else forget
            if trainer.strategy.reduce_boolean_decision(self.forget_loss >= self.reference.held_out, all=True):
                self._end(trainer)
                return
        if self._good:
            self._keep(module)

    def _end(self, trainer: Trainer) -> None:
        self.stopped_at = self._steps
        trainer.should_stop = True

    @torch.no_grad()
    def _keep(self, module: LightningModule) -> None:
        if self._good:
            for tensor, copy in self._good:
                copy.copy_(tensor)
            return
        moving = chain((one for one in module.parameters() if one.requires_grad), module.buffers())
        self._good = [(tensor.detach(), tensor.detach().clone()) for tensor in moving]

    @torch.no_grad()
    def _take_back(self) -> None:
        for tensor, copy in self._good:
            tensor.copy_(copy)


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
            held_out = data.val_loader()
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

    def _warn(self, text: str) -> None:
        self.notes.append(text)
        warnings.warn(text, UnlearningWarning, stacklevel=2)
