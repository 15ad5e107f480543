"""A user's configured optimizers for a short pass: their base learning rates scaled, their schedules left aside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_unlearn.utilities.checks import expected

__all__ = ["base_learning_rate", "configured_optimizers", "scaled_optimizers"]

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


def base_learning_rate(group: Mapping[str, Any]) -> float:
    """The learning rate a parameter group was meant to have, whatever a scheduler has made of it at its start.

    OneCycle's peak, else the rate a scheduler remembered as initial, else the current one.

    >>> base_learning_rate({"lr": 4e-5, "initial_lr": 4e-5, "max_lr": 1e-3}), base_learning_rate({"lr": 0.1})
    (0.001, 0.1)
    """
    rate: Any = group.get("max_lr", group.get("initial_lr", group["lr"]))
    return float(rate)


def configured_optimizers(configured: Any) -> tuple[list[Optimizer], list[Any]]:
    """Optimizers and schedulers (or Lightning's scheduler mappings) in what `configure_optimizers` returned.

    Raises:
        TypeError: none of the forms that Lightning documents, or `None`.
    """

    def dictionary(item: Mapping[str, Any]) -> tuple[Optimizer, list[Any]]:
        found = item.get("lr_scheduler")
        if found is not None and "monitor" in item and not isinstance(found, Mapping):
            found = {"scheduler": found, "monitor": item["monitor"]}
        return item["optimizer"], [] if found is None else [found]

    if hasattr(configured, "param_groups"):
        return [configured], []
    if isinstance(configured, Mapping) and "optimizer" in configured:
        optimizer, schedulers = dictionary(configured)
        return [optimizer], schedulers
    if isinstance(configured, (list, tuple)) and configured:
        if len(configured) == 2 and isinstance(configured[0], list):
            schedulers = configured[1]
            return list(configured[0]), list(schedulers) if isinstance(schedulers, list) else [schedulers]
        if all(isinstance(item, Mapping) and "optimizer" in item for item in configured):
            pairs = [dictionary(item) for item in configured]
            return [optimizer for optimizer, _ in pairs], [found for _, schedulers in pairs for found in schedulers]
        if all(hasattr(item, "param_groups") for item in configured):
            return list(configured), []
    rule = "returning optimizers in one of Lightning's forms"
    raise TypeError(expected("configure_optimizers", rule, configured, "Or give the method an `optimizer`."))


def scaled_optimizers(configured: Any, lr_scale: float, *, keep_schedulers: bool) -> Any:
    """The optimizers of `configure_optimizers`, with their learning rates times `lr_scale`.

    Args:
        configured: What `configure_optimizers` returned, freshly; it is changed.
        lr_scale: Factor on every parameter group's base learning rate.
        keep_schedulers: Keep the schedulers with all their rates scaled (a manually optimised module steps them
            itself), or drop them (they were sized for the whole training).

    Returns:
        A list of optimizers, or a pair of lists of optimizers and schedulers, as Lightning takes it.

    Raises:
        TypeError: as `configured_optimizers`.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    >>> schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.6, total_steps=10)
    >>> [scaled] = scaled_optimizers(([optimizer], [schedule]), 0.5, keep_schedulers=False)
    >>> scaled.param_groups[0]["lr"]
    0.3
    """
    optimizers, schedulers = configured_optimizers(configured)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if keep_schedulers:
                for name in _RATES:
                    if name in group:
                        _scale(group, name, lr_scale)
                continue
            rate = base_learning_rate(group)
            for name in _RATES[1:]:
                group.pop(name, None)
            _assign(group, rate * lr_scale)
    if not keep_schedulers:
        return optimizers
    for scheduler in schedulers:
        _scale_scheduler(scheduler["scheduler"] if isinstance(scheduler, Mapping) else scheduler, lr_scale)
    return (optimizers, schedulers) if schedulers else optimizers


def _assign(group: dict[str, Any], rate: float) -> None:
    # A learning rate given as a tensor (for compiled or captured steps) must stay the same tensor.
    if hasattr(group["lr"], "fill_"):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _scale(group: dict[str, Any], name: str, factor: float) -> None:
    if name == "lr":
        _assign(group, float(group["lr"]) * factor)
    else:
        group[name] = group[name] * factor


def _scale_scheduler(scheduler: Any, factor: float) -> None:
    """Scale what a scheduler remembers of learning rates; chained and sequential ones hold others."""
    for name in ("base_lrs", "min_lrs", "_last_lr"):
        if isinstance(rates := getattr(scheduler, name, None), list):
            setattr(scheduler, name, [rate * factor for rate in rates])
    for inner in getattr(scheduler, "_schedulers", ()):
        _scale_scheduler(inner, factor)
