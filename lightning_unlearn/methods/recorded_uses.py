"""How much learning rate the forgotten samples got: from a store's runs and steps, or from given numbers."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods.base import EditContext
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.checks import expected, shorten

__all__ = ["Rates", "uses_by_anchor"]


@dataclass(frozen=True, slots=True)
class Rates:
    """What is given instead of recorded; `None` where it is to be read from the store.

    Attributes:
        lr: Learning rate.
        epochs: How often every forgotten sample was used.
        batch_size: Batch size.
    """

    lr: float | None = None
    epochs: float | None = None
    batch_size: int | None = None

    @property
    def unknown(self) -> list[str]:
        """Names of what is not given."""
        return [name for name in ("lr", "epochs", "batch_size") if getattr(self, name) is None]


def uses_by_anchor(
    name: str, context: EditContext, rates: Rates, n_samples: int, *, anchored: bool
) -> dict[int, float]:
    r"""Anchor (0 for the initial weights) -> mean over the forgotten samples of :math:`\sum \eta / b` over their uses.

    A use counts for the latest anchor at or before its step.

    Args:
        name: Name of the method, for messages.
        context: The edit's context.
        rates: What is given.
        n_samples: How many rows are forgotten.
        anchored: Whether recorded anchors count; else the initial weights stand for all uses.

    Raises:
        MissingRequirementError: something is neither given nor recorded, or there are no anchors.
    """
    store, plan = context.store, context.plan
    if store is None or plan is None or plan.state is None:
        if anchored:
            remedy = "Pass `store=`, or use anchor='initial'."
            raise MissingRequirementError(expected("store", f"one that knows these weights for {name}", None, remedy))
        if rates.lr is None or rates.epochs is None or rates.batch_size is None:
            rule = f"given where no store knows these weights ({name})"
            raise MissingRequirementError(expected(", ".join(rates.unknown), rule, None, f"Pass them to {name}."))
        return {0: rates.lr * rates.epochs / rates.batch_size}
    ranges = plan.state.ranges
    steps, counts = store.counts_of(plan.request.sample_ids, within=ranges)
    if not steps.size:
        got = shorten(plan.request.sample_ids)
        raise MissingRequirementError(expected("sample_ids", "ids that a recorded step saw", got, "Check them."))
    sizes = store.batch_sizes(steps) if rates.batch_size is None else np.full(len(steps), rates.batch_size)
    anchors = [0]
    if anchored:
        recorded = [step for step in store.anchors if step <= ranges[-1][1]]
        if not recorded:
            remedy = "Record with `DeltaRecorder(store, anchor_every=<steps of an epoch>)`, or use anchor='initial'."
            raise MissingRequirementError(expected("store", f"one with anchors for {name}", "none", remedy))
        anchors += recorded
    scale = 1.0 if rates.epochs is None else rates.epochs * n_samples / float(counts.sum())
    learning = _learning_rates(store, steps.tolist(), rates.lr)
    uses: dict[int, float] = {}
    for step, count, size, lr in zip(steps.tolist(), counts.tolist(), sizes.tolist(), learning, strict=True):
        anchor = anchors[bisect_right(anchors, step) - 1]
        uses[anchor] = uses.get(anchor, 0.0) + scale * lr * count / (size * n_samples)
    return uses


def _learning_rates(store: DeltaStore, steps: list[int], given: float | None) -> list[float]:
    """The rate of every step: the given one, or that of its run, which must be that of one SGD optimizer."""
    if given is not None:
        return [given] * len(steps)
    runs = store.lineage.runs
    firsts = [run.first for run in runs]
    rates = []
    for step in steps:
        run = runs[bisect_right(firsts, step) - 1]
        found = {(optimizer.name, optimizer.lr) for optimizer in run.optimizers}
        if len(found) != 1 or run.optimizers[0].name != "SGD":
            got = shorten(sorted(found))
            remedy = "The rule is one of SGD: pass the rate that stands for a step of it."
            raise MissingRequirementError(expected("lr", "given where not one SGD made the steps", got, remedy))
        rates.append(run.optimizers[0].lr)
    return rates
