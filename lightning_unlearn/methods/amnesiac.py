"""Amnesiac unlearning: subtract what the touched steps changed (Graves, Nagisetty & Ganesh 2021)."""

from __future__ import annotations

from typing import ClassVar

from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods.base import EditContext, Guarantee, Requirement, WeightEdit, hyperparameters
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import Choices, SearchSpace
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import Scale, WeightChange
from lightning_unlearn.utilities.checks import check_choice, expected

__all__ = ["Amnesiac"]


@register
@hyperparameters
class Amnesiac(WeightEdit):
    r"""Subtract the full recorded change of every step that saw a forgotten sample.

    Rule: :math:`\theta_u = \theta - \sum_{t \in S} \Delta_t`, with :math:`S` the steps whose batch held a forgotten
    sample and :math:`\Delta_t` = parameters after - before step `t`, whatever the optimizer.

    Guarantee: the *subtraction* is exact (float64 sum, one rounding per weight; to 1e-7 of the largest weight with
    float32 values). As *forgetting* it is approximate: later steps depended on the removed ones, momentum smears a
    step's effect over the next ones, and a touched step also holds the work of innocent samples. It forgets, rather
    than merely damages, where a subject's samples shared their batches (`SubjectGrouping`); the plan says so.

    Cost: one pass over the touched records; no training.

    Fails: when more than a few percent of all steps are touched (accuracy breaks), and under SGD without momentum.

    Differences from the official code: it subtracts only tensors whose name contains "weight" or "bias"; we subtract
    every trainable parameter. Running statistics are left alone in both; `unlearn` re-estimates them.

    Args:
        scale: `"step"` subtracts whole steps (the paper). `"share"` (not in the paper) subtracts the forgotten
            samples' share of each batch: gentle, a no-op for scattered samples.

    Source: Graves, Nagisetty, Ganesh 2021, arXiv 2010.10981.

    >>> Amnesiac()
    Amnesiac(scale='step')
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.DELTAS, Requirement.DENSE_DELTAS})
    guarantee: ClassVar[Guarantee] = "approximate"
    source: ClassVar[str] = "Graves, Nagisetty, Ganesh 2021, arXiv 2010.10981"
    search_space: ClassVar[SearchSpace] = {
        "scale": Choices(("step", "share")),
    }

    scale: Scale = "step"

    def __post_init__(self) -> None:
        self.scale = check_choice("scale", self.scale, ("step", "share"))

    def compute_edit(self, context: EditContext) -> WeightChange:
        """Minus the sum of the planned deltas, float64.

        Raises:
            MissingRequirementError: no store or plan, or the store was pruned while recording.
            MissingDeltaError: a planned step has no delta.
        """
        store, amounts = planned_amounts(self, context)
        if not store.settings.is_dense:
            raise MissingRequirementError(
                expected(
                    "keep of the store", "1.0 for Amnesiac", store.settings.keep, "Use PartialAmnesiac for this store."
                )
            )
        return {name: -total for name, total in accumulate(store, amounts).items()}


def planned_amounts(method: WeightEdit, context: EditContext) -> tuple[DeltaStore, dict[int, float]]:
    """The store and what the plan still subtracts of each step (step -> fraction).

    Raises:
        MissingRequirementError: the context has no store or no plan.
    """
    if context.store is None or context.plan is None:
        raise MissingRequirementError(f"{method.name} needs {Requirement.DELTAS.value}.")
    return context.store, dict(context.plan.amounts)
