"""Methods that are a loss over parts of the data, minimised by an ordinary Trainer through `UnlearningModule`."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import field
from typing import Any, ClassVar, Literal, Protocol, Self, TypeAlias, TypeVar

from lightning import LightningModule
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_unlearn.methods.base import Cost, UnlearningMethod, hyperparameters
from lightning_unlearn.methods.partial_updates import PartialUpdates
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.batch_adapter import BatchAdapter
from lightning_unlearn.utilities.checks import check_choice, check_positive, check_positive_int, expected

__all__ = [
    "ForgetStatistics",
    "LossMethod",
    "LossOf",
    "OptimizerFactory",
    "OutputsOf",
    "PushingMethod",
    "StopRule",
    "UnlearningHost",
    "as_loss",
    "user_loss",
    "weighted_sum",
]

V = TypeVar("V")

OptimizerFactory: TypeAlias = Callable[[Iterable[Parameter]], Optimizer]

LossOf: TypeAlias = Callable[[Any], Tensor | None]
"""Batch -> the user's training loss, `None` where the user's step skips it."""

OutputsOf: TypeAlias = Callable[[Any], tuple[Tensor, Tensor]]
"""Batch -> logits and targets."""

ForgetStatistics: TypeAlias = Literal["auto", "running", "batch", "update"]
"""What normalisation layers do with forget batches: normalise with `"running"` statistics, with those of the `"batch"`
without learning from them, or `"update"` the running ones as in training; `"auto"` is `"batch"` where the same step
also sees retain data and the forget batch has more than one sample, else `"running"`."""

StopRule: TypeAlias = Literal["held_out", "retain"] | None
"""When a method that pushes ends early, see `PushingMethod`."""


class UnlearningHost(Protocol):
    """What a `LossMethod` sees of the `UnlearningModule` that runs it; the rest of the user's module is there too."""

    @property
    def batch_adapter(self) -> BatchAdapter:
        """How inputs, targets and logits come out of a batch."""
        ...

    @property
    def current_epoch(self) -> int:
        """Number of the epoch, from 0."""
        ...

    @property
    def global_step(self) -> int:
        """Optimizer steps made so far."""
        ...

    def user_step(self, part: Part, batch: Any, batch_idx: int) -> Any:
        """Run the user's own `training_step` on one part of the batch; its logging goes to that part's names."""
        ...

    def outputs_of(self, part: Part, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits and targets of one part through the adapter; running statistics as in `user_step`."""
        ...

    def frozen_twin(self) -> LightningModule:
        """A copy of the user's module as it is now: in eval mode, without gradients."""
        ...

    def differentiable(self) -> AbstractContextManager[tuple[LossOf, OutputsOf]]:
        """Functions of a batch of a part, differentiable, in eval mode: the user's loss, and logits and targets.

        For a look at the data in `prepare`. Differentiate with `torch.autograd.grad`: a backward pass would set off
        the hooks of data-parallel training. Every process sees all the data, so agree on decisions all the same.
        """
        ...

    def part_loader(self, part: Part | Literal["held_out"]) -> DataLoader[Any]:
        """A part of the pass's data, or the validation data, in evaluation form: in order, every sample once."""
        ...

    def part_batches(self, part: Part | Literal["held_out"]) -> Iterator[Any]:
        """The batches of `part_loader` as a step would get them: after the transfer hooks, on the module's device."""
        ...

    def agreed(self, value: V) -> V:
        """What the first process has as `value` (tensors on the CPU), on every process."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Parameters by name."""
        ...


@hyperparameters
class LossMethod(UnlearningMethod):
    """A method that is a loss, minimised by an ordinary Trainer through `UnlearningModule`.

    Args:
        max_steps: Optimizer steps of the pass; `None` leaves `max_epochs` in charge, without it `default_steps`.
        max_epochs: Passes over the retain data (or over the forget data where no retain part is used).
        optimizer: Builds the optimizer from the parameters; by default the user's own `configure_optimizers`,
            fresh, with its learning rates times `lr_scale` and without schedulers (they were sized for training).
        lr_scale: Factor on the user's learning rates.

    Class attributes:
        parts: Parts of the data in a batch.
        combines_losses: Whether the step needs the user's loss as a value. Modules with manual optimization have
            none, so they can only be run unchanged (`False`).
        recordable: Whether all it does to weights is done by optimizer steps, so that a `DeltaRecorder` can follow.
        default_steps: `max_steps` where neither it nor `max_epochs` is given; `None` where one has to be.
        stop: When the pass ends early; see `PushingMethod`.
        check_every: Steps between two looks at whether it should; see `PushingMethod`.
        forget_statistics: See `ForgetStatistics`.
        updates: Restricts every step to a share of each layer; see `with_updates`.
    """

    cost: ClassVar[Cost] = "some steps"
    parts: ClassVar[tuple[Part, ...]] = ("retain",)
    combines_losses: ClassVar[bool] = True
    recordable: ClassVar[bool] = True
    default_steps: ClassVar[int | None] = None

    max_steps: int | None = None
    max_epochs: int | None = None
    optimizer: OptimizerFactory | None = None
    lr_scale: float = 1.0
    stop: StopRule = field(default=None, init=False)
    check_every: int | None = field(default=1, init=False)
    forget_statistics: ForgetStatistics = field(default="auto", init=False)
    updates: PartialUpdates | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._default_length = self.max_steps is None and self.max_epochs is None
        if self.max_steps is None and self.max_epochs is None:
            self.max_steps = self.default_steps
        if self.max_steps is None and self.max_epochs is None:
            raise ValueError(expected("max_steps", "given where `max_epochs` is not", None, "Say how long to run."))
        self.max_steps = None if self.max_steps is None else check_positive_int("max_steps", self.max_steps)
        self.max_epochs = None if self.max_epochs is None else check_positive_int("max_epochs", self.max_epochs)
        self.lr_scale = check_positive("lr_scale", self.lr_scale)

    @property
    def schedule(self) -> Sequence[tuple[Part, ...]] | None:
        """Parts of every epoch where they change from one to the next, each pass over a part being an epoch of its own.

        `None`: every epoch has all `parts`.
        """
        return None

    def prepare(self, host: UnlearningHost) -> None:
        """Run once at fit start, on device: freeze a teacher, compute a mask. Default: nothing."""

    @abstractmethod
    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Any:
        """Return the loss of one step; `batch` holds the parts the method declares, those of the epoch's schedule."""

    def update_masks(self, host: UnlearningHost, iteration: int) -> Mapping[Parameter, Tensor]:
        """Entries that the coming optimizer step may change, as bool masks; parameters left out are not restricted.

        Asked for before every step, with the step's gradients in place. Masks hold for the update, whatever momentum,
        Adam's state or weight decay would do.

        Args:
            host: What runs the method.
            iteration: Number of the optimizer step, from 0.
        """
        return {} if self.updates is None else self.updates.masks(host.named_parameters(), iteration)

    def with_updates(self, updates: PartialUpdates | None) -> Self:
        """This method with layer-wise partial updates: a copy, of which every step changes a share of each layer only.

        >>> from lightning_unlearn.methods import FineTune
        >>> FineTune().with_updates(PartialUpdates(0.1, "cyclic")).updates.mask
        'cyclic'
        """
        changed = copy.copy(self)
        changed.updates = updates
        return changed

    def with_hyperparameters(self, **changes: Any) -> Self:
        """This method with other hyper-parameters; what `with_updates` has set is kept.

        A length that was given stays: `max_steps` beside an earlier `max_epochs` is a second limit. A default one
        gives way to `max_epochs`.

        Raises:
            ValueError: no such hyper-parameter, a value that the method refuses, or one that `with_updates` overrules.
            TypeError: see `arguments`.

        >>> from lightning_unlearn.methods import FineTune
        >>> FineTune().with_hyperparameters(max_epochs=2)
        FineTune(max_steps=None, max_epochs=2, optimizer=None, lr_scale=0.3333333333333333)
        """
        changed, as_declared = super().with_hyperparameters(**changes), super().with_hyperparameters()
        if self.updates != as_declared.updates:
            if changed.updates != as_declared.updates:
                remedy = "Give the fraction to `with_updates`."
                raise ValueError(expected("changes", "without effect on what `with_updates` has set", changes, remedy))
            changed.updates = self.updates
        return changed

    def _given(self) -> dict[str, Any]:
        given = super()._given()
        if getattr(self, "_default_length", False) and self.max_steps == self.default_steps:
            given.pop("max_steps", None)
        return given

    def epoch_is_over(self, host: UnlearningHost, batch_idx: int) -> bool:
        """Whether the epoch is over before this batch, although there are more; asked on every process."""
        return False

    def end_epoch(self, host: UnlearningHost) -> None:
        """Run at the end of every epoch, on every process. Default: nothing."""

    def conclude(self, host: UnlearningHost) -> None:
        """Run once after the last step, not after an exception; who moves weights here is not `recordable`."""

    def remarks(self) -> list[str]:
        """Sentences about the last pass for its report. Default: none."""
        return []

    def finish(self, host: UnlearningHost) -> None:
        """Run once at the end, also after an exception: let go of what `prepare` has made. Default: nothing."""


@hyperparameters
class PushingMethod(LossMethod):
    """A `LossMethod` that pushes the model away from the forget data, and so can push too far.

    On data that were never memorised the answers can end further from the retrained model's than the untouched ones
    were (`docs/comparison.md`), and some of these losses have no bound. So with validation data a pass is watched:

    - `stop="held_out"` ends it once the loss on the forget data has reached the one that the model had on held-out
      (validation) data, as in a model that never saw them; before the first step if it is there already. That is no
      target for whole classes, nor for data whose losses lie clearly above held-out ones to begin with (wrong labels):
      there the pass goes on to its last step, or to what follows.
    - With either rule a step is taken back, and ends the pass, that damages the model: the loss on the retain data has
      come more than half-way to the one on held-out data at first, or that has risen by half. After a first step of
      that kind the learning rate is halved instead, up to five times. `stop="retain"` has this limit alone: for data
      that held-out data say nothing about, such as a trigger.

    The rules are ours (heuristic), not the papers'.

    Args:
        max_steps: As in `LossMethod`.
        max_epochs: As in `LossMethod`.
        optimizer: As in `LossMethod`.
        lr_scale: As in `LossMethod`.
        stop: `"held_out"`, `"retain"`, or `None` for the paper's fixed number of steps. Without validation data the
            fixed number is run as well, with a warning.
        check_every: Steps between two looks at the losses of at most 200 samples of each kind; `None` looks at the end
            of each epoch with retain data, and takes nothing back.
        forget_statistics: See `ForgetStatistics`.
    """

    stop: StopRule = "held_out"
    check_every: int | None = 1
    forget_statistics: ForgetStatistics = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stop = check_choice("stop", self.stop, ("held_out", "retain", None))
        self.check_every = None if self.check_every is None else check_positive_int("check_every", self.check_every)
        self.forget_statistics = check_choice(
            "forget_statistics", self.forget_statistics, ("auto", "running", "batch", "update")
        )


def as_loss(output: Any) -> Tensor | None:
    """The loss in what a `training_step` returned: a tensor, a mapping with `"loss"`, or `None` for a skipped batch.

    Raises:
        TypeError: something else came back.
    """
    if output is None or isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        loss: Tensor = output["loss"]
        return loss
    raise TypeError(expected("training_step", "returning a tensor, a mapping with `loss`, or None", type(output)))


def user_loss(host: UnlearningHost, part: Part, batch: Mapping[Part, Any], batch_idx: int) -> Tensor | None:
    """The user's own training loss on one part of a batch; `None` where the user's step skips it."""
    return as_loss(host.user_step(part, batch[part], batch_idx))


def weighted_sum(*terms: tuple[float, Tensor | None]) -> Tensor | None:
    """Sum of weight times loss; `None`, which skips the step, where one of the losses is.

    >>> weighted_sum((2.0, None)) is None, float(weighted_sum((2.0, Tensor([1.0])), (-1.0, Tensor([0.5]))))
    (True, 1.5)
    """
    total: Tensor | None = None
    for weight, loss in terms:
        if loss is None:
            return None
        total = weight * loss if total is None else total + weight * loss
    return total
