"""How logits and targets come out of a user's batch, and how a batch with other inputs or targets is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.utilities.checks import expected

__all__ = ["BatchAdapter", "OutputsFunction", "as_batch_adapter", "logits_in"]

OutputsFunction: TypeAlias = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""(module, batch) -> logits and targets."""

_REMEDY = "Pass `adapter`, a `BatchAdapter` whose methods are overridden for such batches."


def logits_in(answer: Any) -> Tensor | None:
    """The logits in what a module gives: the tensor that it is, or that it has under `logits`; else `None`.

    >>> logits_in({"logits": torch.ones(1, 2)}), logits_in(torch.ones(2))
    (tensor([[1., 1.]]), None)
    """
    if isinstance(answer, Mapping) and "logits" in answer:
        answer = answer["logits"]
    answer = getattr(answer, "logits", answer)
    return answer if isinstance(answer, Tensor) and answer.is_floating_point() and answer.ndim >= 2 else None


class BatchAdapter:
    """Reads a batch as inputs and targets, and a module's answer as logits; override what is different in your task.

    As it is, batches are sequences whose first two entries are inputs and targets, or mappings with the given keys, and
    `forward` takes the inputs (of a mapping: all entries but the targets, by keyword). Logits have their classes in
    dimension 1; targets are class numbers (classification, segmentation) or floating-point numbers of the logits'
    shape in [0, 1] (multi-label).

    Calling the adapter with a module and a batch gives logits and targets, as a plain function would.

    Args:
        target_key: Name of the targets in mapping batches.
        input_key: Name of the inputs in mapping batches; `None` for all other entries, passed by keyword.

    >>> adapter = BatchAdapter()
    >>> x, y = torch.ones(2, 3), torch.tensor([0, 1])
    >>> logits, targets = adapter(nn.Linear(3, 2), (x, y))
    >>> logits.shape, targets.tolist(), adapter.replaced((x, y, "kept"), targets=1 - y)[1:]
    (torch.Size([2, 2]), [0, 1], (tensor([1, 0]), 'kept'))
    """

    def __init__(self, *, target_key: str = "labels", input_key: str | None = None) -> None:
        self.target_key = target_key
        self.input_key = input_key

    def __call__(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits and targets of a batch."""
        return self.logits(module, self.inputs(batch)), self.targets(batch)

    def inputs(self, batch: Any) -> Any:
        """What `forward` is given.

        Raises:
            MissingRequirementError: the batch is of another kind.
        """
        if isinstance(batch, Mapping):
            self._check_key(batch, self.target_key)
            if self.input_key is None:
                return {key: value for key, value in batch.items() if key != self.target_key}
            self._check_key(batch, self.input_key)
            return batch[self.input_key]
        return self._pair(batch)[0]

    def targets(self, batch: Any) -> Tensor:
        """What the answer should be; raises as `inputs`."""
        if isinstance(batch, Mapping):
            self._check_key(batch, self.target_key)
            targets = batch[self.target_key]
        else:
            targets = self._pair(batch)[1]
        if not isinstance(targets, Tensor):
            raise MissingRequirementError(expected("targets", "a tensor", type(targets).__name__, _REMEDY))
        return targets

    def replaced(self, batch: Any, *, inputs: Any = None, targets: Tensor | None = None) -> Any:
        """A batch of the same kind with other inputs or targets (those that are not `None`); the given one stays."""
        if isinstance(batch, Mapping):
            changes: dict[str, Any] = {} if targets is None else {self.target_key: targets}
            if inputs is not None:
                changes |= inputs if self.input_key is None else {self.input_key: inputs}
            return type(batch)({**batch, **changes})  # type: ignore[call-arg]
        old_inputs, old_targets = self._pair(batch)
        first = old_inputs if inputs is None else inputs
        parts = [first, old_targets if targets is None else targets, *batch[2:]]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)

    def logits(self, module: nn.Module, inputs: Any) -> Tensor:
        """The module's answer, with the classes in dimension 1.

        Raises:
            MissingRequirementError: the answer is no floating-point tensor and holds none under `logits`.
        """
        answer = module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
        logits = logits_in(answer)
        if logits is None:
            rule = "returning logits of shape (N, C, ...), or something with them as `logits`"
            raise MissingRequirementError(expected("forward", rule, type(answer).__name__, _REMEDY))
        return logits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats: of class numbers, or binary where targets are floating-point numbers.

        Raises:
            MissingRequirementError: floating-point targets of another shape than the logits.
        """
        if not targets.is_floating_point():
            return functional.cross_entropy(logits, targets)
        if targets.shape != logits.shape:
            rule = f"class numbers, or floating-point numbers of the logits' shape {tuple(logits.shape)}"
            raise MissingRequirementError(expected("targets", rule, tuple(targets.shape), _REMEDY))
        return functional.binary_cross_entropy_with_logits(logits, targets)

    def wrong_targets(self, targets: Tensor, n_classes: int, *, avoid_true: bool = True) -> Tensor:
        """Random other targets: classes drawn uniformly (without the true one), multi-label targets flipped.

        Negative class numbers, which losses take for "to be ignored", stay.

        Args:
            targets: Class numbers of any shape, or multi-label targets.
            n_classes: Number of classes, at least 2.
            avoid_true: Whether the true class is never drawn.

        Raises:
            MissingRequirementError: floating-point targets outside [0, 1], of which nobody knows what is wrong.
        """
        if targets.is_floating_point():
            if bool(((targets < 0) | (targets > 1)).any()):
                rule = "class numbers, or numbers in [0, 1], where wrong ones are to be drawn"
                remedy = "Pass `adapter`, a `BatchAdapter` whose `wrong_targets` is overridden."
                raise MissingRequirementError(expected("targets", rule, float(targets.abs().max()), remedy))
            return 1 - targets
        if n_classes < 2:
            raise ValueError(expected("n_classes", "at least 2", n_classes))
        if avoid_true:
            drawn = (targets + torch.randint_like(targets, 1, n_classes)) % n_classes
        else:
            drawn = torch.randint_like(targets, n_classes)
        return torch.where(targets < 0, targets, drawn)

    def _check_key(self, batch: Mapping[Any, Any], key: str) -> None:
        if key not in batch:
            remedy = "Pass `adapter=BatchAdapter(target_key=..., input_key=...)`."
            raise MissingRequirementError(expected("batch", f"a mapping with {key!r}", sorted(map(str, batch)), remedy))

    def _pair(self, batch: Any) -> tuple[Any, Any]:
        if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) < 2:
            shape = [type(item).__name__ for item in batch] if isinstance(batch, list | tuple) else type(batch).__name__
            raise MissingRequirementError(expected("batch", "a sequence of inputs and targets", shape, _REMEDY))
        return batch[0], batch[1]


class _FunctionAdapter(BatchAdapter):
    """A plain function of module and batch: logits and targets can be read, and the batch cannot be changed."""

    def __init__(self, function: OutputsFunction) -> None:
        super().__init__()
        self._function = function

    def __call__(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return self._function(module, batch)

    def inputs(self, batch: Any) -> Any:
        raise self._too_little("inputs")

    def targets(self, batch: Any) -> Tensor:
        raise self._too_little("targets")

    def replaced(self, batch: Any, *, inputs: Any = None, targets: Tensor | None = None) -> Any:
        raise self._too_little("replaced")

    def _too_little(self, name: str) -> MissingRequirementError:
        rule = f"a `BatchAdapter` with `{name}` for this method, which changes batches"
        return MissingRequirementError(expected("adapter", rule, "a function", "Subclass `BatchAdapter`."))


def as_batch_adapter(adapter: BatchAdapter | OutputsFunction | None) -> BatchAdapter:
    """An adapter as it is, around a function, or the default one.

    >>> as_batch_adapter(None).target_key
    'labels'
    """
    if isinstance(adapter, BatchAdapter):
        return adapter
    return BatchAdapter() if adapter is None else _FunctionAdapter(adapter)
