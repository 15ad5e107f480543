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
from lightning_unlearn.utilities.modes import isolated_rng

__all__ = ["HeldOutReference", "held_out_reference", "whole_classes"]

_GROUP = 4
"""Samples of which one loss is taken in the comparison: a step of one sample is more than some modules can do."""

_LEVEL = 0.01
_RANKED = 500
_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class HeldOutReference:
    """The losses of a model before a pass.

    Attributes:
        forget: On the forget data.
        held_out: On held-out data.
        retain: On the retain data.
        whole_classes: Whether the forget data are whole classes, of which held-out data have samples as well.
        above: Whether losses on the forget data lie above those on held-out data already.
    """

    forget: float
    held_out: float
    retain: float
    whole_classes: bool = False
    above: bool = False

    @property
    def is_target(self) -> bool:
        """Whether the held-out loss is what a model that never saw the forget data can be expected to have on them."""
        return not (self.whole_classes or self.above)

    def damage(self, retain: float | None, held_out: float | None) -> str | None:
        """What is wrong with a model that has these losses now; `None` for nothing.

        That is: the retain loss is more than half-way to the held-out loss it began with, or (where no whole classes
        go) the held-out loss is up by half of itself. Losses may be near each other, near zero or negative, so both may
        always rise by half of themselves, and by half of what lies between them. NaN is damage.
        """
        for name, now, before, rise in (
            ("the data to keep", retain, self.retain, max(self.held_out - self.retain, abs(self.retain))),
            ("held-out data", held_out, self.held_out, max(self.held_out - self.retain, abs(self.held_out))),
        ):
            if self.whole_classes and name == "held-out data":
                continue
            if now is not None and not now <= before + _SHARE * rise:
                return f"the loss on {name} rose from {before:.3g} to {now:.3g}"
        return None


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
        return replace(found, whole_classes=True)
    if found.forget > found.held_out:
        size = max(1, min(_GROUP, len(forget)))
        # More held-out samples than for a mean: one forget sample has to be above a hundred others to tell.
        others = ProbeData(held_out.loader, max_samples=_RANKED)
        groups = [data.group_losses(module, size) for data in (forget, others)]
        return replace(found, above=float(mannwhitneyu(*groups, alternative="greater").pvalue) < _LEVEL)
    return found


def whole_classes(
    adapter: BatchAdapter, forget: DataLoader[Any], retain: DataLoader[Any], *, max_samples: int = 20_000
) -> bool:
    """Whether no retain sample (of so many, drawn at random) has a class that is to be forgotten.

    They are read until one is found, so many only for classes that go as a whole, or are very rare: with 2,000 of them
    one sample of a class among a thousand was taken for a whole class in one of six requests. False as well where the
    batches do not tell one class a sample.
    """
    try:
        with isolated_rng(0):  # a loader draws a seed whenever it is gone through
            asked = set(chain.from_iterable(_classes(adapter, forget)))
            drawn = subset_loader(retain, ProbeData(retain, max_samples=max_samples).positions, part=None)
            return not any(asked & set(batch) for batch in _classes(adapter, drawn))
    except MissingRequirementError:
        return False


def _classes(adapter: BatchAdapter, loader: DataLoader[Any]) -> Iterator[Sequence[int]]:
    for batch in loader:
        targets = adapter.targets(batch)
        if targets.is_floating_point() or targets.ndim != 1:
            raise MissingRequirementError(expected("targets", "one class number a sample", targets.dtype))
        yield targets.tolist()
