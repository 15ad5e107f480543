"""User's hooks that need adapting, defined on a facade only where the user has overridden them.

Lightning asks whether a hook is overridden and acts (or warns) on the answer, so a hook the user does not have must not
appear. All other hooks run natively: they belong to the same object.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lightning import LightningModule

from lightning_unlearn.modules.refusals import is_overridden

__all__ = ["ADAPTED_HOOKS", "adapted_hooks", "run_step"]


def _partwise(name: str) -> Callable[..., Any]:
    """A batch-transfer hook: the user's code sees one part at a time, as it would in training."""

    def hook(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        users = getattr(super(self._facade_of, self), name)
        state = self._unlearning_pass
        if state.active and isinstance(batch, dict) and batch and set(batch) <= set(state.method.parts):
            return {part: users(piece, *args, **kwargs) for part, piece in batch.items()}
        return users(batch, *args, **kwargs)

    return hook


def on_train_batch_end(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
    """The user's hook sees the retain batch, after the user's own step has run on it."""
    users = super(self._facade_of, self).on_train_batch_end
    if not self._unlearning_pass.active:
        users(outputs, batch, batch_idx)
    elif self._unlearning_pass.ran_on_retain:
        users(outputs, batch["retain"], batch_idx)


def optimizer_step(self: Any, *args: Any, **kwargs: Any) -> None:
    """Lightning's own step for a method's own optimizer: the user's was written for another (warm-up and the like)."""
    state = self._unlearning_pass
    if state.active and state.method.optimizer is not None:
        LightningModule.optimizer_step(self, *args, **kwargs)
    else:
        super(self._facade_of, self).optimizer_step(*args, **kwargs)


ADAPTED_HOOKS: Mapping[str, Callable[..., Any]] = {
    **{
        name: _partwise(name)
        for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    },
    "on_train_batch_end": on_train_batch_end,
    "optimizer_step": optimizer_step,
}


def run_step(step: Callable[..., Any], batch: Any, batch_idx: int) -> Any:
    """Call a user's `training_step`, which may leave `batch_idx` out.

    >>> run_step(lambda batch: batch, "batch", 3), run_step(lambda batch, batch_idx: batch_idx, "batch", 3)
    ('batch', 3)
    """
    parameters = inspect.signature(step).parameters.values()
    indexed = len(parameters) > 1 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    return step(batch, batch_idx) if indexed else step(batch)


def adapted_hooks(user_cls: type) -> dict[str, Callable[..., Any]]:
    """The adapted hooks that this class needs."""
    return {name: hook for name, hook in ADAPTED_HOOKS.items() if is_overridden(user_cls, name)}
