"""Running statistics of normalisation layers: keep forget batches out of them, and estimate them anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.modes import preserved_modes

__all__ = ["StatisticsPolicy", "frozen_statistics", "reestimate_batch_norm", "tracking_layers"]

StatisticsPolicy: TypeAlias = Literal["running", "batch"]
"""Normalise with the running statistics (as in eval mode), or with those of the batch (as in train mode)."""


def tracking_layers(module: nn.Module) -> list[_NormBase]:
    """Normalisation layers that keep running statistics (BatchNorm, SyncBatchNorm, tracking InstanceNorm).

    >>> len(tracking_layers(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))))
    1
    """
    layers = (layer for layer in module.modules() if isinstance(layer, _NormBase))
    return [layer for layer in layers if layer.track_running_stats and layer.running_mean is not None]


@contextmanager
def frozen_statistics(module: nn.Module, policy: StatisticsPolicy) -> Iterator[None]:
    """Run the module inside without a trace in its running statistics; every buffer is bit-identical afterwards.

    Args:
        module: Any module.
        policy: `"running"` puts the layers into eval mode, for small or one-sided batches. `"batch"` leaves them as
            they are but sets their momentum to zero, so the output equals that of ordinary training.

    >>> layer = nn.BatchNorm1d(2)
    >>> with frozen_statistics(layer, "batch"):
    ...     _ = layer(torch.randn(8, 2))
    >>> layer.running_mean.tolist(), int(layer.num_batches_tracked), layer.momentum
    ([0.0, 0.0], 0, 0.1)
    """
    layers = tracking_layers(module)
    kept = [(layer, layer.training, layer.momentum, _copy(layer.num_batches_tracked)) for layer in layers]
    for layer in layers:
        if policy == "running":
            layer.training = False
        else:
            layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, training, momentum, tracked in kept:
            layer.training, layer.momentum = training, momentum
            if tracked is not None and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.copy_(tracked)


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def reestimate_batch_norm(
    module: nn.Module, batches: Iterable[Any], forward: Callable[[Any], object], *, max_batches: int | None = None
) -> bool:
    """Replace running statistics by the mean over some batches, weights unchanged.

    The statistics are reset and averaged cumulatively (every batch counts the same), with only these layers in train
    mode: dropout stays off. Modes and momenta are restored; after an exception the old statistics are as well.

    Args:
        module: The module; its root mode inside is eval.
        batches: Batches on the module's device, in random order: batches of one class each would understate variance.
        forward: Puts one batch through the module; runs without gradients.
        max_batches: Stop after so many batches.

    Returns:
        Whether there was a layer to do this for; where not, no batch is drawn.

    Raises:
        ValueError: `batches` is empty; nothing was changed.

    >>> layer = nn.BatchNorm1d(1)
    >>> reestimate_batch_norm(layer, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])], layer)
    True
    >>> layer.running_mean.item(), layer.running_var.item(), layer.num_batches_tracked.item()
    (4.0, 2.0, 2)
    """
    layers = tracking_layers(module)
    if not layers:
        return False
    buffers = [buffer for layer in layers for buffer in layer.buffers()]
    values = [buffer.detach().clone() for buffer in buffers]
    momenta = [layer.momentum for layer in layers]
    done = 0
    try:
        with preserved_modes(module), torch.no_grad():
            module.eval()
            for layer in layers:
                layer.training = True
                layer.momentum = None  # torch's name for a cumulative mean
                layer.reset_running_stats()
            for done, batch in enumerate(batches, start=1):
                for layer in layers:
                    if isinstance(layer, _InstanceNorm):  # which takes None for "do not update"
                        layer.momentum = 1.0 / done
                forward(batch)
                if done == max_batches:
                    break
        if not done:
            raise ValueError(expected("batches", "at least one batch to estimate statistics from", "none"))
    except BaseException:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    return True
