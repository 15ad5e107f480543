"""A module that knows nothing: every parameter drawn anew."""

from __future__ import annotations

import torch
from torch import nn

from lightning_unlearn.utilities.modes import isolated_rng

__all__ = ["reinitialise"]


@torch.no_grad()
def reinitialise(module: nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew, in place, frozen ones as well; the random state outside stays.

    Layers with `reset_parameters` (all of PyTorch's) reset themselves and their running statistics. Parameters of other
    layers, for which nobody knows a distribution, have their own entries shuffled, which keeps mean and spread.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    >>> reinitialise(net, seed=1); first = net[0].weight.clone()
    >>> reinitialise(net, seed=2); bool((net[0].weight == first).any())
    False
    """
    with isolated_rng(seed):
        drawn: set[nn.Parameter] = set()
        for layer in module.modules():
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if callable(reset):
                reset()
                drawn.update(layer.parameters(recurse=False))
        for parameter in module.parameters():
            if parameter not in drawn and parameter.numel() > 1:
                order = torch.randperm(parameter.numel()).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view(parameter.shape))
