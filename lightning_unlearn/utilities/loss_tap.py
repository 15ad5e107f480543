"""The logits that a step gives to its loss function, found while the step runs, without a change to the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["LossTap"]

# `nn.CrossEntropyLoss` and its like call these, and whatever name they were imported by, they are these objects.
_LOSSES = frozenset({functional.cross_entropy, functional.nll_loss, functional.binary_cross_entropy_with_logits})


class LossTap(TorchFunctionMode):
    """Inside this context, everything that is given to a classification loss, and can be differentiated, is noted.

    The losses are PyTorch's cross-entropy, negative log-likelihood (whose input are log-probabilities: the logits up to
    a constant for each sample) and binary cross-entropy with logits. One written by hand is not seen.

    Args:
        found: Called with the logits of each call, in order.

    >>> import torch
    >>> logits, seen = torch.zeros(2, 3, requires_grad=True), []
    >>> with LossTap(seen.append):
    ...     _ = functional.cross_entropy(logits, torch.tensor([0, 1]))
    >>> seen[0] is logits
    True
    """

    def __init__(self, found: Callable[[Tensor], object]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function as it is, and note what a loss is given."""
        kwargs = kwargs or {}
        if func in _LOSSES:
            logits = args[0] if args else kwargs.get("input")
            if isinstance(logits, Tensor) and logits.requires_grad:
                self._found(logits)
        return func(*args, **kwargs)
