"""What cannot be wrapped, found out before anything changes."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from lightning import LightningModule, Trainer

from lightning_unlearn.exceptions import MissingRequirementError, UnsupportedStrategyError
from lightning_unlearn.methods.loss_method import LossMethod
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.facade import check_shareable

__all__ = ["check_method", "check_module", "check_reloading", "drop_redundant_entries", "is_overridden"]


def is_overridden(cls: type, name: str) -> bool:
    """Whether a LightningModule class has something of its own under `name`."""
    return getattr(cls, name, None) is not getattr(LightningModule, name, None)


def check_module(model: Any, added: Collection[str], replaced: Collection[str]) -> None:
    """Refuse objects whose behaviour a facade would silently change or lose.

    Args:
        model: What the user wants to wrap.
        added: Names that the wrapper adds.
        replaced: Methods that the wrapper replaces.

    Raises:
        TypeError: not a LightningModule.
        MissingRequirementError: there is no `training_step` to call.
        UnsupportedStrategyError: a name is taken; a method was replaced on the instance (as `torch.compile` does); the
            step takes the loader's iterator; state lives in `__slots__`.
    """
    if not isinstance(model, LightningModule):
        inner = getattr(model, "_orig_mod", None)
        remedy = "It was compiled: pass the module inside it." if isinstance(inner, LightningModule) else ""
        raise TypeError(expected("model", "a LightningModule", type(model), remedy))
    cls = type(model)
    check_shareable(cls, "model")
    if not is_overridden(cls, "training_step"):
        raise MissingRequirementError(expected("model", "a module with a `training_step`", cls.__qualname__))
    if "dataloader_iter" in inspect.signature(cls.training_step).parameters:
        remedy = "Take the batch instead: a forgetting pass has to see its parts."
        raise UnsupportedStrategyError(
            expected("training_step", "a function of one batch", "one of `dataloader_iter`", remedy)
        )
    held = {*model.__dict__, *model._parameters, *model._buffers, *model._modules}
    taken = sorted(name for name in added if hasattr(cls, name) or name in held)
    if taken:
        rule, remedy = f"without an attribute `{taken[0]}`", "Rename it: the wrapper adds one of that name."
        raise UnsupportedStrategyError(expected("model", rule, cls.__qualname__, remedy))
    drop_redundant_entries(model, model)
    shadowing = sorted(name for name in replaced if name in model.__dict__)
    if shadowing:
        remedy = "Undo it first; after `torch.compile(module)` use `lightning.pytorch.utilities.compile.to_uncompiled`."
        rule = f"a module whose `{shadowing[0]}` is its class's own"
        raise UnsupportedStrategyError(expected("model", rule, "one that was replaced on the instance", remedy))


def check_method(model: LightningModule, method: Any) -> None:
    """Refuse a method that cannot run through this module.

    Raises:
        TypeError: not a `LossMethod`.
        UnsupportedStrategyError: the module optimizes manually, and the method combines losses or brings an optimizer.
        MissingRequirementError: nobody says how to optimize.
    """
    if not isinstance(method, LossMethod):
        raise TypeError(expected("method", "a LossMethod", method))
    if not model.automatic_optimization:
        if method.combines_losses:
            remedy = "Its `training_step` returns no loss to combine; use a method that runs it unchanged (FineTune)."
            rule = f"optimized automatically for {method.name}"
            raise UnsupportedStrategyError(expected("model", rule, "manual optimization", remedy))
        if method.optimizer is not None:
            remedy = "A manually optimized module steps the optimizers of its own `configure_optimizers`."
            raise UnsupportedStrategyError(expected("optimizer", "None for this module", method.optimizer, remedy))
    if method.optimizer is None and not is_overridden(type(model), "configure_optimizers"):
        remedy = "Give the method an `optimizer`."
        raise MissingRequirementError(
            expected("model", "a module with `configure_optimizers`", type(model).__qualname__, remedy)
        )


def check_reloading(method: LossMethod, trainer: Trainer) -> None:
    """Refuse a Trainer that would give every epoch the loaders of the first.

    Raises:
        UnsupportedStrategyError: the method's epochs differ in their parts, and the Trainer keeps its loaders.
    """
    every = vars(trainer)["reload_dataloaders_every_n_epochs"]  # set from outside, so it has no declared type
    if method.schedule is not None and every != 1:
        rule = f"1 for {method.name}, whose epochs train on different parts of the data"
        remedy = "Pass it to the Trainer."
        raise UnsupportedStrategyError(expected("reload_dataloaders_every_n_epochs", rule, every, remedy))


def drop_redundant_entries(model: LightningModule, owner: object) -> None:
    """Delete entries of the instance dict that are `owner`'s bound methods of the class under the same name.

    Un-compiling and data-parallel forwards leave them behind. They change nothing, but hide the wrapper's methods, or
    keep the wrapper alive in the user's object.
    """
    for name, value in list(model.__dict__.items()):
        if getattr(value, "__self__", None) is not owner:
            continue
        if getattr(value, "__func__", None) is getattr(type(owner), name, None):
            del model.__dict__[name]
