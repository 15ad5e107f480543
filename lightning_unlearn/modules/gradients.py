"""The loss and the logits of a trained module, differentiable, outside a Trainer: what a `WeightEdit` computes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.methods.loss_method import LossOf, OutputsOf, as_loss
from lightning_unlearn.modules.silent import silent_step, transferred
from lightning_unlearn.utilities.batch_adapter import BatchAdapter, OutputsFunction, as_batch_adapter
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.modes import evaluating, preserved_buffers

__all__ = ["differentiable"]


@contextmanager
def differentiable(
    model: LightningModule, adapter: BatchAdapter | OutputsFunction | None = None
) -> Iterator[tuple[LossOf, OutputsOf]]:
    """Give functions from a batch to the user's training loss, and to logits and targets, both with gradients.

    The module is in eval mode inside: dropout is off and normalisation uses its running statistics. Buffers, modes,
    metrics and gradients that were there are as before afterwards; nothing is logged.

    Args:
        model: The user's module, automatically optimized.
        adapter: How logits and targets come out of a batch.

    Yields:
        Loss of a batch (`None` where the user's step skips it), and logits and targets of a batch.

    Raises:
        UnsupportedStrategyError: the module is optimized manually, so its step returns no loss.
    """
    if not model.automatic_optimization:
        rule = "optimized automatically for a method that differentiates its loss"
        raise UnsupportedStrategyError(expected("model", rule, "manual optimization", "Use another method."))
    reads = as_batch_adapter(adapter)
    with evaluating(model), preserved_buffers(model), silent_step(model, gradients=True) as step:

        def loss(batch: Any) -> Tensor | None:
            return as_loss(step(batch, 0))

        def outputs(batch: Any) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                return reads(model, transferred(model, batch))

        yield loss, outputs
