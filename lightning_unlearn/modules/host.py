"""What a wrapped module offers to the method that it runs, besides the user's step: data, teachers, agreement."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

from lightning import LightningModule
from torch.utils.data import DataLoader

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import MissingRequirementError, UnsupportedStrategyError
from lightning_unlearn.methods.base import Requirement
from lightning_unlearn.methods.loss_method import LossOf, OutputsOf
from lightning_unlearn.modules.gradients import differentiable
from lightning_unlearn.modules.pass_state import PassState
from lightning_unlearn.modules.silent import transferred
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.batch_adapter import BatchAdapter
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.whole_modules import filled
from lightning_unlearn.utilities.whole_weights import is_sharded, whole_tensors

__all__ = ["HostServices"]

V = TypeVar("V")


class HostServices(LightningModule):
    """The part of `UnlearningModule` that reads; see `UnlearningHost`, the protocol."""

    __slots__ = ()

    _unlearning_pass: PassState

    @property
    def batch_adapter(self) -> BatchAdapter:
        """How inputs, targets and logits come out of a batch."""
        return self._unlearning_pass.adapter

    def frozen_twin(self) -> LightningModule:
        """A copy of the user's module as it is now: in eval mode, without gradients, on the same device.

        Under a strategy that shards the module, the copy is whole on every process.

        Raises:
            UnsupportedStrategyError: something else than the Trainer's strategy has sharded the module.
        """
        state = self._unlearning_pass
        if not is_sharded(self):
            twin = copy.deepcopy(state.user)
        elif state.skeleton is not None:
            twin = filled(state.skeleton, whole_tensors(self)).to(self.device)
        else:
            rule, remedy = "sharded by the Trainer's strategy, for a method with a teacher", "Pass the Trainer one."
            raise UnsupportedStrategyError(expected("model", rule, "a module that is sharded already", remedy))
        twin.requires_grad_(False)
        return twin.eval()

    def differentiable(self) -> AbstractContextManager[tuple[LossOf, OutputsOf]]:
        """Functions of a batch, in eval mode: the user's loss, and logits and targets; see `modules.gradients`."""
        state = self._unlearning_pass
        return differentiable(state.user, state.adapter)

    def part_loader(self, part: Part | Literal["held_out"]) -> DataLoader[Any]:
        """Data of the pass in evaluation form: in order, every sample once, on every process all of them.

        Args:
            part: A part of the training data, or the validation data.

        Raises:
            MissingRequirementError: the Trainer was not given an `UnlearningDataModule`, or there are no such data.
        """
        data, name = getattr(self.trainer, "datamodule", None), self._unlearning_pass.method.name
        if not isinstance(data, UnlearningDataModule):
            rule = f"an `UnlearningDataModule` for {name}, which looks at the data first"
            raise MissingRequirementError(expected("datamodule", rule, type(data), "Pass it to `fit`."))
        if part == "held_out":
            held_out = data.val_loader()
            if held_out is None:
                raise MissingRequirementError(f"{name} needs {Requirement.VALIDATION_DATA.value}.")
            return held_out
        return data.forget_loader() if part == "forget" else data.retain_loader()

    def part_batches(self, part: Part | Literal["held_out"]) -> Iterator[Any]:
        """Batches of `part_loader` after the user's transfer hooks, on the module's device; raises as that does."""
        user = self._unlearning_pass.user
        for batch in self.part_loader(part):
            yield transferred(user, batch)

    def agreed(self, value: V) -> V:
        """What the first process has as `value`, on every process."""
        return self.trainer.strategy.broadcast(value)
