"""The last moment before an optimizer step changes weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

__all__ = ["look_before_change"]


def _versions(optimizer: Optimizer) -> list[int]:
    return [parameter._version for group in optimizer.param_groups for parameter in group["params"]]


def look_before_change(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], look: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Have `look` called right before a step changes weights; for use in a step's pre-hook.

    With automatic optimization a step is given a closure that runs `training_step`, the backward pass and the hooks
    around them, so what these do to the weights is to be seen only when the closure has returned. Later calls of the
    closure are the optimizer's own trials, behind which nothing is looked at. The same holds for an optimizer that has
    changed weights before it calls the closure at all, which autograd's version counters tell.

    Args:
        optimizer: The optimizer that is about to step.
        args: Positional arguments of the step, the optimizer itself first.
        kwargs: Keyword arguments of the step.
        look: What to call; without a closure it is called at once.

    Returns:
        What the step is to be called with instead; `None` for no change.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> args, kwargs = look_before_change(optimizer, (optimizer, weight.sum), {}, lambda: print("before the step"))
    >>> _ = args[1]()
    before the step
    """
    named = "closure" in kwargs
    closure = kwargs["closure"] if named else args[1] if len(args) > 1 else None
    if not callable(closure):
        look()
        return None
    given, called = _versions(optimizer), False

    def listening(*inner_args: Any, **inner_kwargs: Any) -> Any:
        nonlocal called
        first, called = not called and _versions(optimizer) == given, True
        result = closure(*inner_args, **inner_kwargs)
        if first:
            look()
        return result

    if named:
        return args, {**kwargs, "closure": listening}
    return (args[0], listening, *args[2:]), kwargs
