"""What the losses of a model before a pass say about how far it may be pushed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from lightning import LightningModule
from scipy.stats import mannwhitneyu
from torch.utils.data import DataLoader

from lightning_unlearn.data.splits import subset_loader
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.modules.probe import ProbeData
from lightning_unlearn.utilities.batch_adapter import BatchAdapter
from lightning_unlearn.utilities.checks import expected

__all__ = ["HeldOutReference", "held_out_reference", "whole_classes"]

_GROUP = 4
"""Samples of which one loss is taken in the comparison: a step of one sample is more than some modules can do."""

_LEVEL = 0.01
_SLACK = 1.25


@dataclass(frozen=True, slots=True)
class HeldOutReference:
    """The losses of a model before a pass.

    Attributes:
        forget: On the forget data.
        held_out: On held-out data.
        retain: On the retain data.
        unlike: Why the held-out loss is no target for the forget data; `None` where it is one.
    """

    forget: float
    held_out: float
    retain: float
    unlike: str | None = None

    @property
    def limit(self) -> float:
        """The retain loss above which the model has been damaged: what it keeps is like what it never saw.

        At least a quarter above where it began, so that a model that generalises perfectly may be touched at all.
        """
        return max(self.held_out, _SLACK * self.retain)


def held_out_reference(
    module: LightningModule, forget: ProbeData, held_out: ProbeData, retain: ProbeData, adapter: BatchAdapter
) -> HeldOutReference | None:
    """Measure a model before a pass, and see whether the forget data can be expected to become like held-out data.

    They cannot where they are whole classes, of which a model that never saw them knows nothing; nor where their losses
    lie above those of held-out data already, as those of wrong labels do (Mann-Whitney test of losses of groups of
    samples, one-sided, at the 1 % level).

    Returns:
        `None` for a module without a loss to look at.
    """
    losses = [data.mean_loss(module) for data in (forget, held_out, retain)]
    if losses[0] is None or losses[1] is None or losses[2] is None:
        return None
    found = HeldOutReference(losses[0], losses[1], losses[2])
    if whole_classes(adapter, forget.loader, retain.loader):
        return replace(found, unlike="they are whole classes")
    if found.forget > found.held_out:
        size = max(1, min(_GROUP, len(forget)))
        groups = [data.group_losses(module, size) for data in (forget, held_out)]
        if float(mannwhitneyu(*groups, alternative="greater").pvalue) < _LEVEL:
            why = f"the loss on them ({found.forget:.3f}) lies above that ({found.held_out:.3f}) already"
            return replace(found, unlike=why)
    return found


def whole_classes(
    adapter: BatchAdapter, forget: DataLoader[Any], retain: DataLoader[Any], *, max_samples: int = 2000
) -> bool:
    """Whether no retain sample (of so many, drawn at random) has a class that is to be forgotten.

    False as well where the batches do not tell one class a sample.
    """
    try:
        asked = set(chain.from_iterable(_classes(adapter, forget)))
        drawn = ProbeData(retain, max_samples=max_samples).positions
        return not any(asked & set(batch) for batch in _classes(adapter, subset_loader(retain, drawn, part=None)))
    except MissingRequirementError:
        return False


def _classes(adapter: BatchAdapter, loader: DataLoader[Any]) -> Iterator[Sequence[int]]:
    for batch in loader:
        targets = adapter.targets(batch)
        if targets.is_floating_point() or targets.ndim != 1:
            raise MissingRequirementError(expected("targets", "one class number a sample", targets.dtype))
        yield targets.tolist()
