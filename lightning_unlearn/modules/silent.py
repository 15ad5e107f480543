"""A view of a user's module whose `training_step` can be run outside a Trainer, leaving no trace in the module."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.modules.hooks import run_step
from lightning_unlearn.modules.metrics_swap import MetricCopies
from lightning_unlearn.modules.pass_state import PassState
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.facade import facade_class, on_same_state
from lightning_unlearn.utilities.optimizers import configured_optimizers
from lightning_unlearn.utilities.trainers import idle_trainer
from lightning_unlearn.utilities.whole_weights import under_fsdp1

__all__ = ["silent_step", "transferred"]

_CONTAINERS = (dict, list, set, deque, defaultdict, Counter)


class _Inert:
    """An optimizer that a manually optimized step may drive without a weight moving."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return closure() if closure is not None else None

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to clear."""

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        yield


class _InertSchedule:
    """A scheduler that a manually optimized step may drive without a rate changing."""

    def __init__(self, schedule: Any) -> None:
        self._schedule = schedule

    def step(self, *args: Any, **kwargs: Any) -> None:
        """The rate stays."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedule, name)


class _SilentModule(LightningModule):
    """The user's module with everything that would reach the Trainer, an optimizer or a gradient switched off."""

    __slots__ = ("_inert", "_inert_schedules")

    _inert: list[_Inert]
    _inert_schedules: list[_InertSchedule]

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is logged."""

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is logged."""

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Inert stand-ins of the user's optimizers."""
        return self._inert[0] if len(self._inert) == 1 else self._inert

    def lr_schedulers(self) -> Any:
        """Inert stand-ins of the user's schedulers, `None` without any."""
        schedules = self._inert_schedules
        return (schedules[0] if len(schedules) == 1 else schedules) or None

    def manual_backward(self, *args: Any, **kwargs: Any) -> None:
        """No gradients."""

    def toggle_optimizer(self, *args: Any, **kwargs: Any) -> None:
        """`requires_grad` stays."""

    def untoggle_optimizer(self, *args: Any, **kwargs: Any) -> None:
        """`requires_grad` stays."""

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """No gradients to clip."""


@contextmanager
def silent_step(
    model: LightningModule, *, gradients: bool = False, transfer: bool = True
) -> Iterator[Callable[[Any, int], Any]]:
    """Give a function that runs the user's `training_step` on a batch, without logging and optimizer steps.

    The step runs on a second object with a *copy* of the module's instance dict, so attributes, lists and dicts it
    fills are the copy's, and loggers write nothing; parameters, buffers and submodules are the module's own (restore
    buffers and modes around it, if they must not change). Metrics are swapped for empty copies, and where the module
    has no Trainer an idle one answers for it.

    Args:
        model: The user's module, or an `UnlearningModule` around it.
        gradients: Whether what is returned can be differentiated.
        transfer: Whether batches go through the module's transfer hooks first; not those that have been through.

    Yields:
        Function from a batch and its index to what `training_step` returns.

    Raises:
        UnsupportedStrategyError: the module is under FSDP1, whose layers only run within a forward of the outermost.
    """
    if under_fsdp1(model):
        rule = "not sharded by FSDP1 where a method looks at the model beside its steps"
        remedy = "Use `ModelParallelStrategy` (FSDP2); a method's `stop=None` looks at nothing."
        raise UnsupportedStrategyError(expected("model", rule, "one under FullyShardedDataParallel", remedy))
    wrapped = getattr(model, "_unlearning_pass", None)  # asked this way because the wrapper itself needs this file
    if isinstance(wrapped, PassState):
        model = wrapped.user
    view = _view(model)
    step = view.training_step

    def run(batch: Any, batch_idx: int) -> Any:
        if transfer:
            batch = transferred(view, batch)
        with torch.set_grad_enabled(gradients):
            return run_step(step, batch, batch_idx)

    with ExitStack() as stack:
        children = [child for child in model.modules() if isinstance(child, LightningModule) and child is not model]
        trainers = [(child, child._trainer) for child in children]
        idle = None if view._trainer is not None else idle_trainer(view)
        if idle is not None:
            view.trainer = idle
        optimizers, schedules = _configured(view)
        # Past `nn.Module.__setattr__`: these belong to the view alone.
        object.__setattr__(view, "_inert", [_Inert(optimizer) for optimizer in optimizers])
        object.__setattr__(view, "_inert_schedules", [_InertSchedule(schedule) for schedule in schedules])
        stack.enter_context(MetricCopies().in_place(view))
        stack.enter_context(_unlogged(view._trainer))
        try:
            yield run
        finally:
            for child, trainer in trainers:
                child._trainer = trainer


def transferred(module: LightningModule, batch: Any) -> Any:
    """A batch after the module's transfer hooks, on its device and in its precision."""
    batch = module.on_before_batch_transfer(batch, 0)
    batch = module.transfer_batch_to_device(batch, module.device, 0)
    batch = module.on_after_batch_transfer(batch, 0)
    dtype = next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)

    def cast(item: Tensor) -> Tensor:
        # What the plugins of true half and double precision do to a step's inputs.
        return item.to(dtype) if item.is_floating_point() else item

    return batch if dtype in (None, torch.float32) else apply_to_collection(batch, Tensor, cast)


def _view(model: LightningModule) -> Any:
    # The dicts that name submodules and buffers, and the user's own lists, are the view's; what they hold is not.
    known: dict[int, Any] = {}
    state = {name: _copied(value, known) for name, value in model.__dict__.items()}
    for name, value in list(state.items()):
        # A bound method on the instance would lead back to the module, compiled or not.
        if getattr(getattr(value, "_torchdynamo_orig_callable", value), "__self__", None) is model:
            del state[name]
    return on_same_state(facade_class(_SilentModule, type(model)), state)


def _copied(value: Any, known: dict[int, Any]) -> Any:
    """Plain containers, and those inside of them, as new ones; everything else as it is."""
    if type(value) not in _CONTAINERS:
        return value
    if id(value) not in known:
        known[id(value)] = copied = copy(value)
        places = value.items() if isinstance(value, dict) else enumerate(() if isinstance(value, set) else value)
        for place, one in places:
            if type(one) in _CONTAINERS:
                copied[place] = _copied(one, known)
    return known[id(value)]


@contextmanager
def _unlogged(trainer: Trainer | None) -> Iterator[None]:
    """Loggers that write nothing inside, for steps that log to `self.logger` themselves."""
    if trainer is None or not trainer.loggers:
        yield
        return
    before = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in before]
    try:
        yield
    finally:
        trainer.loggers = before


def _configured(view: Any) -> tuple[list[Optimizer], list[Any]]:
    """What `self.optimizers()` and `self.lr_schedulers()` give: the user's for manual steps, else some groups."""
    if view.automatic_optimization:
        return [torch.optim.SGD(list(view.parameters()) or [torch.zeros(1)], lr=0.0)], []
    optimizers, schedules = configured_optimizers(view.configure_optimizers())
    return optimizers, [item["scheduler"] if isinstance(item, Mapping) else item for item in schedules]
