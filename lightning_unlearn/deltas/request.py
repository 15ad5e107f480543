"""A request to forget samples, and its plan."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_unlearn.deltas.judgement import PlanThresholds
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.plan import DeletionPlan
from lightning_unlearn.deltas.planner import make_plan
from lightning_unlearn.deltas.requested import RequestedSamples
from lightning_unlearn.functional.pruning import Keep
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import Scale

__all__ = ["DeletionRequest"]


@dataclass(frozen=True, init=False)
class DeletionRequest(RequestedSamples):
    """Samples that a model is to forget.

    >>> request = DeletionRequest(["user-7", 3])
    >>> request.without({3})
    DeletionRequest(sample_ids=('user-7',))
    >>> request.plan(None).remaining_methods
    ('FineTune', 'Retrain')

    Args:
        sample_ids: Their ids, as recorded: positions in the dataset, or keys.

    Raises:
        DeletionRequestError: no id, an id twice, or one that is neither an integer nor a string.
    """

    def plan(
        self,
        store: DeltaStore | None,
        model: nn.Module | None = None,
        *,
        scale: Scale = "step",
        keep: Keep = None,
        ledger: DeletionLedger | None = None,
        thresholds: PlanThresholds | None = None,
    ) -> DeletionPlan:
        """Find out what the request comes to; nothing is changed.

        Args:
            store: What was recorded, or `None`: the plan then says which methods remain.
            model: The weights to forget in; `None` stands for the latest the store knows.
            scale: `"step"` subtracts touched steps wholly, `"share"` the samples' share of each batch.
            keep: How far stored deltas, or as a `Pruning` says their sum, are pruned further; see `accumulate`.
            ledger: The ledger; by default the store's, with the key beside it, where edits were made before.
            thresholds: Where the plan warns and refuses.

        Raises:
            StoreMismatchError: the store is of another model, or does not know these weights.
            StoreCorruptedError: the store is damaged.
            MissingRequirementError: the sum is to be pruned, of deltas that were pruned while recording.
        """
        return make_plan(self, store, model, scale, keep, ledger, thresholds or PlanThresholds())
