"""What keeps a pass from doing harm unnoticed: no effect, non-finite weights, a collapsed model.

A probe on retain data before and after is trusted more than any threshold on the weights.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from lightning import LightningModule
from torch import nn

from lightning_unlearn.exceptions import LightningUnlearnError, NoEffectWarning, UnsupportedStrategyError
from lightning_unlearn.types import WeightChange
from lightning_unlearn.utilities.checks import expected

__all__ = [
    "ProbeThresholds",
    "Verdict",
    "check_finite",
    "damage_sentence",
    "judge_probe",
    "nonfinite_parameters",
    "private_copy",
    "warn_if_unchanged",
]

Verdict: TypeAlias = Literal["fine", "warn", "collapsed"]


@dataclass(frozen=True, slots=True)
class ProbeThresholds:
    """When a probe warns and when it calls for a rollback.

    Accuracy (fractions): a drop of 2 points warns and one of 5 rolls back, as measured on small CNNs. Loss is used
    where the module has no accuracy: there is no measurement behind its factors, they are ours (heuristic).

    Attributes:
        warn_accuracy: Drop in retain accuracy that warns.
        rollback_accuracy: Drop in retain accuracy that rolls back.
        warn_loss: Growth of the retain loss, as a factor plus the same in nats, that warns.
        rollback_loss: The same, that rolls back.
    """

    warn_accuracy: float = 0.02
    rollback_accuracy: float = 0.05
    warn_loss: float = 0.25
    rollback_loss: float = 1.0


def judge_probe(
    before: Mapping[str, float], after: Mapping[str, float], thresholds: ProbeThresholds | None = None
) -> Verdict:
    """Compare two probes (`procedures.probes.probe`) of the same retain samples; accuracy decides where there is one.

    >>> judge_probe({"loss": 0.1, "accuracy": 0.98}, {"loss": 0.3, "accuracy": 0.95})
    'warn'
    """
    limits = thresholds or ProbeThresholds()
    if not math.isfinite(after.get("loss", 0.0)):
        return "collapsed"
    if "accuracy" in before and "accuracy" in after:
        drop = before["accuracy"] - after["accuracy"]
        return _graded(drop, limits.warn_accuracy, limits.rollback_accuracy)
    if "loss" in before and "loss" in after:
        # Relative growth for large losses, absolute growth for losses near zero.
        growth = (after["loss"] - before["loss"]) / max(abs(before["loss"]), 1.0)
        return _graded(growth, limits.warn_loss, limits.rollback_loss)
    return "fine"


def _graded(value: float, warn: float, rollback: float) -> Verdict:
    # A tolerance far below one sample: 0.98 - 0.96 is not to fall on the other side of 0.02.
    tolerance = 1e-9
    if value >= rollback - tolerance:
        return "collapsed"
    return "warn" if value >= warn - tolerance else "fine"


def check_finite(change: WeightChange, method: str) -> None:
    """Refuse a change with NaN or infinity before it is applied.

    Raises:
        LightningUnlearnError: naming the layers.
    """
    broken = [name for name, delta in change.items() if not bool(torch.isfinite(delta).all())]
    if broken:
        raise LightningUnlearnError(
            f"Expected the change computed by {method} to be finite, but got NaN or infinity in "
            f"{', '.join(broken[:5])}. Nothing was changed; check the store with `lightning-unlearn store verify`."
        )


def warn_if_unchanged(before: str, after: str, method: str) -> bool:
    """Warn with `NoEffectWarning` when the digests of the weights agree; return whether they did."""
    if before == after:
        warnings.warn(f"{method} changed no weight: the model is what it was before.", NoEffectWarning, stacklevel=2)
    return before == after


def nonfinite_parameters(module: nn.Module) -> list[str]:
    """Names of parameters that hold NaN or infinity."""
    return [name for name, parameter in module.named_parameters() if not bool(torch.isfinite(parameter).all())]


def private_copy(model: LightningModule) -> LightningModule:
    """A deep copy of the user's module, so that a pass never changes the module it was given.

    Raises:
        UnsupportedStrategyError: it holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (TypeError, RuntimeError, ValueError, AssertionError, copy.Error) as error:  # FSDP2 raises an assertion
        remedy = "Take such attributes (open files, locks, tensors with a gradient history) off the module first."
        rule = "a module that `copy.deepcopy` can copy, since a pass works on a copy"
        raise UnsupportedStrategyError(expected("model", rule, str(error), remedy)) from error


def damage_sentence(
    before: Mapping[str, float], after: Mapping[str, float], verdict: Verdict, rolled_back: bool
) -> str:
    """What the probe saw, in one sentence."""

    def text(item: Mapping[str, float]) -> str:
        accuracy = f"accuracy {item['accuracy']:.1%}, " if "accuracy" in item else ""
        return accuracy + (f"loss {item['loss']:.3f}" if "loss" in item else "no loss")

    end = "The original model is returned unchanged." if rolled_back else "The damaged model is returned as asked."
    if verdict == "warn":
        end = "Consider a repair (`then=FineTune(max_steps=50)`)."
    return f"Retain data before the pass: {text(before)}; after: {text(after)}. {end}"
