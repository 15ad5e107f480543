"""Separate copies of a module's torchmetrics objects, so that one part's batches do not count in the other's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torchmetrics import Metric, MetricCollection

__all__ = ["MetricCopies"]


def _slots(module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[nn.Module, str, Metric | MetricCollection]]:
    """Where metrics hang: (owner, name, metric), outermost metrics only, every name of a shared one."""
    seen.add(module)
    # Not `named_children`, which leaves out the second name of a child.
    for name, child in module._modules.items():
        if isinstance(child, (Metric, MetricCollection)):
            yield module, name, child
        elif child is not None and child not in seen:
            yield from _slots(child, seen)


class MetricCopies:
    """Copies of every metric a module holds, put in place of the originals for a while.

    Copies are made once, empty, and follow the originals' device. A metric object that hangs in several places is
    copied once.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Any, Any]] = {}

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module's code finds the copies under the names of the originals.

        >>> from torchmetrics import MeanMetric
        >>> module, copies = nn.ModuleDict({"mean": MeanMetric()}), MetricCopies()
        >>> with copies.in_place(module):
        ...     module["mean"].update(3.0)
        >>> module["mean"].update_count
        0
        """
        slots = list(_slots(module, set()))
        try:
            for owner, name, metric in slots:
                # Past `__setattr__`: a name such as "0" of a ModuleList is no attribute.
                owner._modules[name] = self._copy(metric)
            yield
        finally:
            for owner, name, metric in slots:
                owner._modules[name] = metric

    def reset(self) -> None:
        """Empty every copy."""
        for _, copy in self._copies.values():
            copy.reset()

    def _copy(self, metric: Any) -> Any:
        known = self._copies.get(id(metric))
        if known is None:
            copy = metric.clone()
            copy.reset()
            # The original is kept as well: its id must not be given to another object.
            self._copies[id(metric)] = known = (metric, copy)
        original, copy = known
        device = getattr(original, "device", None)
        if device is not None and getattr(copy, "device", None) != device:
            copy.to(device)
        copy.train(original.training)
        return copy
