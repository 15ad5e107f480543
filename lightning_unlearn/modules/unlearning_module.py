"""A LightningModule around a user's trained LightningModule, for a forgetting pass in an ordinary Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Generic, TypeVar, cast

from lightning import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import LBFGS
from torchmetrics import Metric

from lightning_unlearn.exceptions import MissingRequirementError, UnlearningWarning, UnsupportedStrategyError
from lightning_unlearn.methods.loss_method import LossMethod
from lightning_unlearn.modules.hooks import ADAPTED_HOOKS, adapted_hooks, run_step
from lightning_unlearn.modules.host import HostServices
from lightning_unlearn.modules.pass_state import PassState
from lightning_unlearn.modules.refusals import check_method, check_module, check_reloading, drop_redundant_entries
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.batch_adapter import BatchAdapter, OutputsFunction, as_batch_adapter
from lightning_unlearn.utilities.batch_norm import frozen_statistics
from lightning_unlearn.utilities.batches import leading_size
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.facade import facade_class, on_same_state
from lightning_unlearn.utilities.optimizers import configured_optimizers, scaled_optimizers
from lightning_unlearn.utilities.whole_modules import skeleton_of

__all__ = ["CHECKPOINT_KEY", "UnlearningModule"]

M = TypeVar("M", bound=LightningModule)

CHECKPOINT_KEY = "unlearning"
"""Key of a forgetting pass in a checkpoint; loading the checkpoint into the user's class ignores it."""

_REPLACED = (
    *ADAPTED_HOOKS,
    "configure_callbacks",
    "configure_optimizers",
    "log",
    "log_dict",
    "on_before_optimizer_step",
    "on_fit_end",
    "on_fit_start",
    "on_load_checkpoint",
    "on_save_checkpoint",
    "on_train_batch_start",
    "on_train_end",
    "on_train_epoch_end",
    "on_train_epoch_start",
    "setup",
    "training_step",
)


class UnlearningModule(HostServices, Generic[M]):
    """The user's module with a method's step in place of its `training_step`.

    The object is a *facade* (`utilities/facade.py`): its class is `(UnlearningModule, class of the user's module)` and
    its `__dict__` is the user's own. So every hook, callback, hyper-parameter, parameter name, `isinstance` check and
    sharding strategy finds what it found in training, and what is trained is the user's object itself. Only a few
    things differ while the wrapper is in force:

    - `training_step` runs the method's `step` on `{"forget": ..., "retain": ...}`; `user_step` runs the user's own
      `training_step` on one part. Logging of the retain part keeps the user's names, that of the forget part is
      prefixed with `forget/` and counted in metric objects of its own.
    - Running statistics of normalisation layers learn nothing from forget batches, unless the method says so: the
      layers normalise with the running ones where a step has forget batches alone, else with the batch's.
    - Optimizers are the method's, else the user's, fresh, at `method.lr_scale` times their base learning rate and
      without schedulers. Manually optimized modules keep theirs (scaled) and run their step unchanged.
    - The user's callbacks from `configure_callbacks` stay away; user hooks around a batch see the retain part.

    Callbacks of a Trainer get the batch with its parts. Python lists and plain attributes that a user's step fills are
    shared by both parts.

    Args:
        model: A trained LightningModule. It is not copied: the pass changes its weights.
        method: What to minimise.
        adapter: How inputs, targets and logits come out of a batch, for methods that need them: a `BatchAdapter`, or
            for methods that change no batch a function `(module, batch) -> (logits, targets)`.

    Raises:
        TypeError: not a LightningModule, or not a `LossMethod`.
        MissingRequirementError: no `training_step`, or no way to optimize.
        UnsupportedStrategyError: already wrapped, methods replaced on the instance, manual optimization with a method
            that combines losses, and other cases named in the message.
    """

    __slots__ = ("_unlearning_pass",)

    _unlearning_pass: PassState
    _facade_of: ClassVar[type[UnlearningModule[Any]]]

    def __new__(cls, model: M, *args: Any, **kwargs: Any) -> UnlearningModule[M]:
        """An object of the class `(cls, class of the model)` on the model's state."""
        if isinstance(model, UnlearningModule):
            rule = "a module that is not wrapped yet"
            raise UnsupportedStrategyError(expected("model", rule, "an UnlearningModule", "Call its `unwrap()` first."))
        check_module(model, _added(), _REPLACED)
        instance: UnlearningModule[M] = _on(cls, model)
        return instance

    def __init__(self, model: M, method: LossMethod, *, adapter: BatchAdapter | OutputsFunction | None = None) -> None:
        # No `super().__init__()`: it would reset the state, which is the user's.
        check_method(model, method)
        _enter(self, PassState(model, method, as_batch_adapter(adapter)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was built on the fly and has no importable name; the user's object pickles by its own rules.
        state = self._unlearning_pass
        return _rebuild, (self._facade_of, state.user, state.method, state.adapter, state.active)

    def unwrap(self) -> M:
        """The user's own module, trained; from now on this object only passes through to it.

        Read `trainer.global_step` before, not after. May be called again, and after an exception in `fit`.
        """
        state = self._unlearning_pass
        state.active = False
        state.finish(self)
        # A data-parallel forward leaves a bound method of this object behind in the dict.
        drop_redundant_entries(state.user, self)
        return cast(M, state.user)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Ignore `log` and `log_dict` inside, so that `user_step` can be run for its loss alone."""
        state = self._unlearning_pass
        before, state.silent = state.silent, True
        try:
            yield
        finally:
            state.silent = before

    def user_step(self, part: Part, batch: Any, batch_idx: int) -> Any:
        """Run the user's own `training_step` on one part; what it logs goes to that part's names and metrics."""
        step = super().training_step
        with self._in_part(part, batch):
            output = run_step(step, batch, batch_idx)
        if part == "retain":
            state = self._unlearning_pass
            state.ran_on_retain = state.ran_this_epoch = True
            state.retain_output = output
        return output

    def outputs_of(self, part: Part, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits and targets of one part through the adapter; running statistics as in `user_step`."""
        with self._in_part(part, batch):
            return self.batch_adapter(self, batch)

    @contextmanager
    def _in_part(self, part: Part, batch: Any) -> Iterator[None]:
        state = self._unlearning_pass
        with ExitStack() as stack:
            if part == "forget":
                stack.enter_context(state.forget_metrics.in_place(self))
                policy = state.policy(batch)
                if policy is not None:
                    stack.enter_context(frozen_statistics(self, policy))
            state.part, state.batch = part, batch
            try:
                yield
            finally:
                state.part = state.batch = None

    # The names `batch` and `batch_idx` are looked up by Lightning.
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One step of the method; outputs the user's step returned besides the loss are kept for the user's hooks."""
        state = self._unlearning_pass
        if not state.active:
            return run_step(super().training_step, batch, batch_idx)
        state.ran_on_retain, state.retain_output = False, None
        state.parts = tuple(batch)
        output = state.method.step(self, batch, batch_idx)
        retained, state.retain_output = state.retain_output, None
        if isinstance(output, Tensor) and isinstance(retained, Mapping):
            return {**retained, "loss": output}
        return output

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as ever; inside `user_step("forget", ...)` under `forget/<name>`."""
        state = self._unlearning_pass
        if state.silent:
            return
        if state.part is not None:
            if kwargs.get("batch_size") is None and (size := leading_size(state.batch)) is not None:
                # Lightning would guess from the whole mapping of parts, whose sizes differ.
                kwargs["batch_size"] = size
            if state.part == "forget":
                name = f"forget/{name}"
                if isinstance(value, Metric):
                    kwargs.setdefault("metric_attribute", name)  # the copy hangs nowhere that Lightning looks
        super().log(name, value, *args, **kwargs)

    def configure_callbacks(self) -> Any:
        """None of the user's: they were chosen for training, and would replace the Trainer's."""
        return [] if self._unlearning_pass.active else super().configure_callbacks()

    def configure_optimizers(self) -> Any:
        """The method's optimizer, or the user's with scaled learning rates.

        Raises:
            MissingRequirementError: the user's `configure_optimizers` returned nothing.
        """
        state = self._unlearning_pass
        if not state.active:
            return super().configure_optimizers()
        if state.method.optimizer is not None:
            return state.method.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        configured = super().configure_optimizers()
        if configured is None:
            rule = "returning an optimizer"
            raise MissingRequirementError(
                expected("configure_optimizers", rule, configured, "Give the method an `optimizer`.")
            )
        if any(isinstance(optimizer, LBFGS) for optimizer in configured_optimizers(configured)[0]):
            text = "LBFGS runs the step several times for each update, so logged values and metrics count them all."
            warnings.warn(text, UnlearningWarning, stacklevel=2)
        return scaled_optimizers(configured, state.method.lr_scale, keep_schedulers=not self.automatic_optimization)

    def setup(self, stage: str) -> None:
        """The user's hook; what is sharded next is kept in mind without its weights, for a twin that may be asked."""
        super().setup(stage=stage)
        state = self._unlearning_pass
        if state.active and isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            state.skeleton = skeleton_of(state.user)

    def on_fit_start(self) -> None:
        """The user's hook, then the method's preparation: device, shards and wrappers are in place.

        Raises:
            UnsupportedStrategyError: the method's epochs differ in their parts, and the Trainer keeps its loaders.
        """
        super().on_fit_start()
        state = self._unlearning_pass
        if not state.active:
            return
        check_reloading(state.method, self.trainer)
        state.prepared, state.iteration = True, 0
        state.method.prepare(self)
        for optimizer in self.trainer.optimizers:
            state.stop_listening.append(optimizer.register_step_post_hook(self._after_step).remove)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """The user's hook, then the method's."""
        super().on_before_optimizer_step(optimizer)
        state = self._unlearning_pass
        if state.active:
            state.update.begin(state.method.update_masks(self, state.iteration))

    def _after_step(self, *args: Any) -> None:
        # A step that a gradient scaler skips does not come here, and has changed nothing.
        state = self._unlearning_pass
        state.update.end()
        state.iteration += 1

    def on_fit_end(self) -> None:
        """The user's hook; the method lets go of what it has prepared."""
        super().on_fit_end()
        self._unlearning_pass.finish(self)

    def on_train_epoch_start(self) -> None:
        """Empty the forget part's metrics, as Lightning does with the logged ones; then the user's hook."""
        if self._unlearning_pass.active:
            self._unlearning_pass.forget_metrics.reset()
            self._unlearning_pass.ran_this_epoch = False
        super().on_train_epoch_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """The user's hook for a retain batch, without which there is nothing it was written for; -1 ends the epoch."""
        state = self._unlearning_pass
        if not state.active:
            return super().on_train_batch_start(batch, batch_idx)
        if state.method.epoch_is_over(self, batch_idx):
            return -1
        return super().on_train_batch_start(batch["retain"], batch_idx) if "retain" in batch else None

    def on_train_epoch_end(self) -> None:
        """The user's hook where the user's step has run, for it computes from what that gathered; then the method's."""
        state = self._unlearning_pass
        if not state.active or state.ran_this_epoch:
            super().on_train_epoch_end()
        if state.active:
            state.method.end_epoch(self)

    def on_train_end(self) -> None:
        """The user's hook, then the method's."""
        super().on_train_end()
        state = self._unlearning_pass
        if state.active:
            state.method.conclude(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The user's hook, then a mark of the pass in plain values."""
        super().on_save_checkpoint(checkpoint)
        state = self._unlearning_pass
        if state.active:
            checkpoint[CHECKPOINT_KEY] = {"method": state.method.name, "parts": list(state.method.parts)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The user's hook; a pass is only resumed from a checkpoint of itself.

        Raises:
            UnsupportedStrategyError: the checkpoint is one of the training (its epoch and optimizer state would be
                taken over) or of another method.
        """
        state = self._unlearning_pass
        if state.active and self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            found = checkpoint.get(CHECKPOINT_KEY, {}).get("method")
            if found != state.method.name:
                rule = f"a checkpoint of a {state.method.name} pass"
                got = f"one of {found}" if found else "one of a training"
                remedy = "Load the weights with `load_from_checkpoint` and wrap the module."
                raise UnsupportedStrategyError(expected("ckpt_path", rule, got, remedy))
        super().on_load_checkpoint(checkpoint)


def _added() -> list[str]:
    """Names that a wrapper has beyond those of every LightningModule."""
    names = [*vars(UnlearningModule), *vars(HostServices)]
    return [name for name in names if not name.startswith("__") and not hasattr(LightningModule, name)]


def _on(wrapper: type[Any], model: LightningModule) -> Any:
    return on_same_state(facade_class(wrapper, type(model), adapted_hooks(type(model))), model.__dict__)


def _enter(instance: Any, state: PassState) -> None:
    # Past `nn.Module.__setattr__`, which would register a module it is given in the user's state.
    object.__setattr__(instance, "_unlearning_pass", state)


def _rebuild(
    wrapper: type[Any], model: LightningModule, method: LossMethod, adapter: BatchAdapter, active: bool
) -> Any:
    instance = _on(wrapper, model)
    _enter(instance, PassState(model, method, adapter, active))
    return instance
