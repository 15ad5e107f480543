"""Gradients of a trained module's loss over parts of the data, as flat vectors: what several methods compute from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.functional.curvature import flat_gradient, unflatten
from lightning_unlearn.methods.base import EditContext, Requirement, UnlearningMethod
from lightning_unlearn.types import WeightChange
from lightning_unlearn.utilities.batches import leading_size
from lightning_unlearn.utilities.checks import expected

__all__ = ["as_change", "batch_gradients", "gradient_sum", "size_of", "split_data", "trainable", "trainable_of"]


def trainable(module: nn.Module) -> dict[str, Parameter]:
    """Parameters that require a gradient, by name, in order; tied ones once.

    >>> list(trainable(nn.Linear(2, 1).requires_grad_(False)))
    []
    """
    return trainable_of(module.named_parameters())


def trainable_of(parameters: Iterable[tuple[str, Parameter]]) -> dict[str, Parameter]:
    """Those of some named parameters that require a gradient."""
    return {name: parameter for name, parameter in parameters if parameter.requires_grad}


def split_data(method: UnlearningMethod, context: EditContext) -> UnlearningDataModule:
    """The data of an edit.

    Raises:
        MissingRequirementError: there are none.
    """
    if context.data is None:
        raise MissingRequirementError(f"{method.name} needs {Requirement.RETAIN_DATA.value}.")
    return context.data


def batch_gradients(
    loss: Callable[[Any], Tensor | None], batches: Iterable[Any], parameters: Mapping[str, Parameter]
) -> Iterator[tuple[Any, Tensor]]:
    """Every batch with the flat gradient of its loss, in float32 or wider; batches without a loss are left out.

    Raises:
        MissingRequirementError: no batch has a loss, seen at the end.
    """
    held, found = list(parameters.values()), False
    for batch in batches:
        value = loss(batch)
        if value is None:
            continue
        found = True
        gradient = flat_gradient(value, held)
        yield batch, gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if not found:
        rule = "returning a loss for one batch at least"
        raise MissingRequirementError(expected("training_step", rule, None, "Use a method that computes none."))


def gradient_sum(
    loss: Callable[[Any], Tensor | None], batches: Iterable[Any], parameters: Mapping[str, Parameter]
) -> tuple[Tensor, int]:
    """Sum of the gradients of single samples, and how many there are; the loss is taken for a mean over its batch."""
    total, count = torch.zeros(()), 0
    for batch, gradient in batch_gradients(loss, batches, parameters):
        size = size_of(batch)
        total, count = total.to(gradient.device) + size * gradient, count + size
    return total, count


def size_of(batch: Any) -> int:
    """How many samples a batch holds.

    Raises:
        MissingRequirementError: it cannot be seen.
    """
    size = leading_size(batch)
    if size is None:
        rule = "one with a tensor, whose first dimension tells how many samples it holds"
        raise MissingRequirementError(expected("batch", rule, type(batch).__name__, "Collate samples into tensors."))
    return size


def as_change(vector: Tensor, parameters: Mapping[str, Parameter]) -> WeightChange:
    """A flat vector as a change of the parameters."""
    return dict(zip(parameters, unflatten(vector, list(parameters.values())), strict=True))
