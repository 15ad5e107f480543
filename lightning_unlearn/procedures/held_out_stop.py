"""The stop of a pass that pushes: at the loss of held-out data, or before the model is damaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.modules.probe import ProbeData
from lightning_unlearn.procedures.reference import HeldOutReference, held_out_reference
from lightning_unlearn.utilities.batch_adapter import BatchAdapter
from lightning_unlearn.utilities.trainers import end_fit
from lightning_unlearn.utilities.whole_weights import reshard

__all__ = ["HeldOutStop"]

_SAMPLES = 200
_HALVINGS = 5


class HeldOutStop(Callback):
    """Ends a pass that pushes: where the forget loss has reached that of held-out data, or before the model is damaged.

    Three losses are measured before the first step (the user's own, mean over some samples, in eval mode): on the
    forget data, on held-out data and on the retain data; see `HeldOutReference`. From then on

    - with `rule="held_out"` the pass ends once the forget loss is no longer below the held-out loss that the model
      began with, which may be before the first step. Where that is no target for the forget data, only what follows;
    - a step that damages the model (`HeldOutReference.damage`) is taken back, and ends the pass. If it is the first,
      the learning rate is halved instead, some times, so that a pass does not end with nothing done.

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
        halvings: How often the learning rate was halved.
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
        self._good: dict[str, Tensor] = {}
        self._stop_listening: list[Callable[[], None]] = []
        self.reference: HeldOutReference | None = None
        self.forget_loss = math.nan
        self.stopped_at: int | None = None
        self.damage: str | None = None
        self.halvings = 0
        self._moved = False

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
        self._stop_listening, self._good = [], {}

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
            damage = trainer.strategy.broadcast(self.reference.damage(*now))
            if damage is not None:
                self._take_back(module)
                if not self._moved and self.halvings < _HALVINGS:
                    self._halve(trainer)
                    return
                self.damage = damage
                self._end(trainer)
                return
            self._moved = True
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
        end_fit(trainer)

    @torch.no_grad()
    def _keep(self, module: LightningModule) -> None:
        reshard(module)  # the losses were those of a forward without a backward
        for name, tensor in _moving(module):
            kept = self._good.get(name)
            if kept is None or kept.shape != tensor.shape:
                self._good[name] = tensor.detach().clone()
            else:
                kept.copy_(tensor)

    @torch.no_grad()
    def _take_back(self, module: LightningModule) -> None:
        reshard(module)
        for name, tensor in _moving(module):
            kept = self._good.get(name)
            if kept is not None and kept.shape == tensor.shape:  # else a buffer that this step has made
                tensor.copy_(kept)

    def _halve(self, trainer: Trainer) -> None:
        self.halvings += 1
        for optimizer in trainer.optimizers:
            optimizer.state.clear()  # momentum would repeat the step
            for group in optimizer.param_groups:
                group["lr"] *= 0.5


def _moving(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """What a step may change, looked up by name: a layer may assign a new tensor to the name of its buffer."""
    yield from ((name, one) for name, one in module.named_parameters() if one.requires_grad)
    yield from module.named_buffers()
