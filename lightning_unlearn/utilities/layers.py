"""Layers of a module in the order of their registration, and the choice of some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_unlearn.utilities.batch_norm import tracking_layers
from lightning_unlearn.utilities.checks import expected, shorten

__all__ = ["chosen_layers", "frozen_statistics_layers", "parameter_layers"]


def parameter_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Submodules that hold trainable parameters of their own, by name, in the order of registration.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2), nn.Linear(2, 1).requires_grad_(False))
    >>> list(parameter_layers(net))
    ['0', '2']
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    }


def chosen_layers(module: nn.Module, k: int, patterns: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The last `k` layers with trainable parameters, or those that a pattern matches.

    Args:
        module: The module.
        k: Number of layers from the end.
        patterns: Patterns (`fnmatch`) of layer names, which replace `k`; one that names a block means all layers in it.

    Raises:
        ValueError: there are fewer than `k` layers, or a pattern matches none.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    >>> list(chosen_layers(net, 1)), list(chosen_layers(net, 1, ["1"]))
    (['1.1'], ['1.0', '1.1'])
    """
    layers = parameter_layers(module)
    if patterns is None:
        if k > len(layers):
            raise ValueError(expected("k", f"at most the number of layers with trainable parameters, {len(layers)}", k))
        return dict(list(layers.items())[-k:])
    matched = {pattern: [name for name in layers if _matches(name, pattern)] for pattern in patterns}
    empty = [pattern for pattern, names in matched.items() if not names]
    if empty or not matched:
        rule = "patterns that match layers with trainable parameters"
        raise ValueError(expected("layers", rule, empty, f"There are {shorten(layers)}."))
    names = {name for found in matched.values() for name in found}
    return {name: layer for name, layer in layers.items() if name in names}


def frozen_statistics_layers(module: nn.Module, chosen: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Layers with running statistics that are not among the chosen.

    One without parameters goes with the layer that was registered before it.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    >>> [layer is net[1] for layer in frozen_statistics_layers(net, chosen_layers(net, 1))]
    [True]
    """
    chosen_ones, statistics = set(chosen.values()), set(tracking_layers(module))
    frozen: list[nn.Module] = []
    is_chosen = False
    for layer in module.modules():
        if next(layer.parameters(recurse=False), None) is not None:
            is_chosen = layer in chosen_ones
        if layer in statistics and not is_chosen:
            frozen.append(layer)
    return frozen


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
