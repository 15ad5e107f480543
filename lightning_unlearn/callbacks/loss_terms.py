"""Terms that callbacks add to the loss of a user's `training_step`, without a change to the module.

A term is part of the loss, not of the gradients behind it: so gradient scalers, accumulation, clipping, data
parallelism and optimizers that call the step several times treat it as if the user had written it into the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Protocol

from lightning import LightningModule
from torch import Tensor

__all__ = ["LossTerm", "add_loss_term", "with_loss_terms"]


class LossTerm(Protocol):
    """What is added to the loss of a step."""

    def watching(self) -> AbstractContextManager[Any]:
        """Around the user's step, from within the Trainer's."""
        ...

    def term(self) -> Tensor | None:
        """What to add to the loss of the step that has just been watched, a scalar; `None` for nothing at all."""
        ...


def add_loss_term(module: LightningModule, term: LossTerm) -> Callable[[], None]:
    """Have `term` added to what the module's `training_step` returns, from the next step on.

    Args:
        module: The module, whose instance gets a `training_step` that calls its own.
        term: See `LossTerm`. Terms are added in the order in which they came.

    Returns:
        A function that takes the term out again; with the last one gone, the instance is as it was. It may be called
        several times.
    """
    step = module.__dict__.get("training_step")
    if not isinstance(step, _StepWithTerms):
        # Past `nn.Module.__setattr__`, as everything that is no parameter, buffer or submodule.
        step = module.__dict__["training_step"] = _StepWithTerms(module)
    step.terms.append(term)
    return partial(step.remove, term)


def with_loss_terms(module: LightningModule, step: Callable[..., Any]) -> Callable[..., Any]:
    """A step of the same module (a silent view of it) with the terms that its training has at present.

    >>> with_loss_terms(LightningModule(), len)
    <built-in function len>
    """
    installed = module.__dict__.get("training_step")
    if not isinstance(installed, _StepWithTerms):
        return step
    return partial(_run, step, installed.terms)


class _StepWithTerms:
    """Stands on the instance in the place of `training_step`."""

    def __init__(self, module: LightningModule) -> None:
        # A compiled module has a step on its instance already.
        self.previous: Any = module.__dict__.get("training_step")
        self.terms: list[LossTerm] = []
        # Lightning looks through `functools.wraps` for the signature, and to see that the step is the user's.
        self.__wrapped__ = module.training_step
        # What makes silent views of the module leave this out, as they do with everything bound to it.
        self.__self__ = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self.__wrapped__, self.terms, *args, **kwargs)

    def remove(self, term: LossTerm) -> None:
        if term in self.terms:
            self.terms.remove(term)
        attributes = self.__self__.__dict__
        if not self.terms and attributes.get("training_step") is self:
            if self.previous is None:
                del attributes["training_step"]
            else:
                attributes["training_step"] = self.previous

    # A copy of the module (of its weights, to average them; of a worker) is a module without the terms.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _own_step, (self.__self__,)


def _own_step(module: LightningModule) -> Any:
    return type(module).training_step.__get__(module)


def _run(step: Callable[..., Any], terms: list[LossTerm], *args: Any, **kwargs: Any) -> Any:
    with ExitStack() as stack:
        for term in terms:
            stack.enter_context(term.watching())
        output = step(*args, **kwargs)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):  # the step skips this batch, or returns what Lightning will refuse
        return output
    for term in terms:
        added = term.term()
        loss = loss if added is None else loss + added
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss
