"""Logits, targets and losses of a user's own LightningModule, without training it and without its `self.log`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from lightning import LightningModule
from torch import Tensor

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.functional.membership import cross_entropy_per_sample
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.in_step import InStep
from lightning_unlearn.utilities.modes import evaluating, isolated_rng
from lightning_unlearn.utilities.whole_weights import is_sharded

__all__ = ["Adapter", "ModelOutputs", "collect_outputs", "collect_outputs_together", "default_adapter"]

Adapter: TypeAlias = Callable[[LightningModule, Any], tuple[Tensor, Tensor]]
"""(module, batch) -> logits (N, C) and integer targets (N,)."""

_REMEDY = (
    "Outputs are read as a classifier's: pass `adapter`, a function of module and batch that returns logits (N, C) and "
    "integer targets (N,)."
)


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """What a model answers on one loader, in the loader's order.

    Attributes:
        logits: float32 (N, C) on the CPU; log-probabilities where the module returns them.
        targets: int64 (N,).
        losses: Cross-entropy of every sample in nats, float64 (N,).
    """

    logits: Tensor
    targets: Tensor
    losses: Tensor

    def __len__(self) -> int:
        """Number of samples."""
        return self.targets.numel()

    @property
    def correct(self) -> Tensor:
        """Whether each prediction is the target, bool (N,)."""
        return self.logits.argmax(dim=1) == self.targets

    @property
    def confidences(self) -> Tensor:
        """Probability given to each target, float64 (N,)."""
        return (-self.losses).exp()

    def with_targets(self, targets: Tensor) -> ModelOutputs:
        """The same answers, scored against other targets.

        Raises:
            ValueError: they are not N integer class numbers.
        """
        targets = targets.cpu()
        _check(self.logits, targets, ValueError, "Pass one class number a sample, in the loader's order.")
        return ModelOutputs(self.logits, targets.long(), cross_entropy_per_sample(self.logits, targets))


def default_adapter(module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """`forward(batch[0])` and `batch[1]` for `(x, y)` batches.

    Raises:
        MissingRequirementError: the batch is no sequence of two tensors, or `forward` is missing or cannot take the
            first (a generator's takes noise).
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        shape = [type(item).__name__ for item in batch] if isinstance(batch, list | tuple) else type(batch).__name__
        raise MissingRequirementError(expected("batch", "a pair (x, y) of tensors", shape, _REMEDY))
    try:
        return module(batch[0]), batch[1]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        rule, got = "a method that takes the first of a batch (x, y)", f"{type(error).__name__}: {error}"
        raise MissingRequirementError(expected("forward", rule, got, _REMEDY)) from error


def _check(logits: Any, targets: Any, error: type[Exception], remedy: str) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        got = (tuple(logits.shape), logits.dtype) if isinstance(logits, Tensor) else type(logits).__name__
        raise error(expected("logits", "a floating tensor of shape (N, C)", got, remedy))
    whole = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
    if not whole or targets.dtype == torch.bool or targets.shape != logits.shape[:1]:
        got = (tuple(targets.shape), targets.dtype) if isinstance(targets, Tensor) else type(targets).__name__
        raise error(expected("targets", f"{logits.shape[0]} integer class numbers", got, remedy))
    classes = logits.shape[1]
    outside = targets[(targets < 0) | (targets >= classes)]
    if outside.numel():
        raise error(expected("targets", f"class numbers from 0 to {classes - 1}", int(outside[0]), remedy))


@contextlib.contextmanager
def _evaluating_on(module: LightningModule, device: torch.device | str | None) -> Iterator[torch.device]:
    """Eval mode on `device`; every submodule's own mode and the module's device come back, whatever happens."""
    home = module.device
    with evaluating(module):
        try:
            if device is not None:
                module.to(device)
            yield module.device
        finally:
            if device is not None:
                module.to(home)


def _moved(module: LightningModule, batch: Any, device: torch.device) -> Any:
    """Bring the batch to the device as a Trainer would, through the module's own hooks."""
    batch = module.on_before_batch_transfer(batch, 0)
    batch = module.transfer_batch_to_device(batch, device, 0)
    return module.on_after_batch_transfer(batch, 0)


def collect_outputs_together(
    models: Mapping[str, LightningModule],
    loader: Iterable[Any],
    *,
    adapter: Adapter | None = None,
    device: torch.device | str | None = None,
) -> dict[str, ModelOutputs]:
    """Show every batch of one pass over the loader to every model.

    All models therefore see the same samples in the same order with the same augmentation, even where the loader
    shuffles: what they return may be compared sample by sample. Models run in eval mode without gradients; their
    modes and device are restored, no hook of training or validation runs and nothing is logged. The global random
    states are what they were before.

    Where a model is in pieces on several processes (FSDP2, tensor parallel), forward passes wait for each other: every
    process calls this with the same models, and with loaders that give the same batches. Each gets the whole result.

    Args:
        models: Name -> module.
        loader: Batches.
        adapter: How to get logits and targets from a module and a batch; by default :func:`default_adapter`.
        device: Where to compute; by default where each module is.

    Returns:
        Name -> outputs, on the CPU.

    Raises:
        MissingRequirementError: a batch, the logits or the targets are not of the expected form; an adapter is needed.
        ValueError: the loader is empty.
        UnsupportedStrategyError: a model is in pieces, and the processes have different batches; on all of them.
        LightningUnlearnError: a model is in pieces, and another process has failed.
    """
    run = adapter or default_adapter
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in models}
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(isolated_rng())
        passes = stack.enter_context(InStep(any(map(is_sharded, models.values()))))
        devices = {name: stack.enter_context(_evaluating_on(model, device)) for name, model in models.items()}
        for batch in passes.batches(loader):
            for name, model in models.items():
                with passes.part():
                    logits, targets = run(model, _moved(model, batch, devices[name]))
                    _check(logits, targets, MissingRequirementError, _REMEDY)
                    found[name].append((logits.float().cpu(), targets.long().cpu()))
    results = {}
    for name, pieces in found.items():
        if not pieces:
            raise ValueError(expected("loader", "a loader with at least one batch", "none"))
        logits, targets = torch.cat([item[0] for item in pieces]), torch.cat([item[1] for item in pieces])
        results[name] = ModelOutputs(logits, targets, cross_entropy_per_sample(logits, targets))
    return results


def collect_outputs(
    model: LightningModule,
    loader: Iterable[Any],
    *,
    adapter: Adapter | None = None,
    device: torch.device | str | None = None,
) -> ModelOutputs:
    """Logits, targets and losses of one model on one loader; see :func:`collect_outputs_together`.

    Raises:
        MissingRequirementError: a batch, the logits or the targets are not of the expected form; an adapter is needed.
        ValueError: the loader is empty.
    """
    return collect_outputs_together({"model": model}, loader, adapter=adapter, device=device)["model"]
