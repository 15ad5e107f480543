"""What a deletion request comes to, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_unlearn.deltas.judgement import Damage, Placement, PlanThresholds, Specificity
from lightning_unlearn.deltas.requested import RequestedSamples
from lightning_unlearn.exceptions import DeletionRequestError, MissingDeltaError
from lightning_unlearn.functional.pruning import Keep
from lightning_unlearn.store.reader import REASONS
from lightning_unlearn.types import ModelState, SampleId, Scale, StepStatus
from lightning_unlearn.utilities.checks import expected, shorten

__all__ = ["DeletionPlan", "PlanThresholds"]


@dataclass(frozen=True, slots=True, eq=False)
class DeletionPlan:
    """Steps, sizes, costs and advice for one request on one state of the weights; made by `DeletionRequest.plan`.

    Without a store only `request`, `recommendation` and `remaining_methods` say something; `state` is `None` then.

    Attributes:
        request: The request.
        scale: Whether whole steps or the samples' shares of them are subtracted.
        keep: How far stored deltas, or their sum, are pruned further.
        state: What the weights were recognised as.
        steps: int64, ascending: steps in these weights that saw a sample not yet forgotten.
        amounts: Step -> fraction of its delta still to subtract; steps that are subtracted already are left out.
        missing_steps: Step -> why its delta, which would be needed, is not there.
        lost_steps: Number of damaged steps in these weights whose ids are lost as well.
        outside_edits: How often something other than an optimizer (weight averaging, clamping) changed these weights
            between two steps or after the last one; subtraction does not undo that.
        unknown_ids: Asked ids that occur in no step of these weights.
        honoured_ids: Asked id -> ledger entry that has already forgotten it in these weights.
        collateral_ids: All other ids in the touched steps.
        touched_fraction: Touched steps / steps in these weights.
        mean_share: Mean share of the asked samples in the touched batches.
        relative_norm: L2 norm of the subtraction / distance of the weights from the initial ones.
        relative_weight_norm: L2 norm of the subtraction / L2 norm of the weights.
        changed_weights: Entries of the subtraction that are not zero.
        weights: Weights that were recorded, which is how many could change.
        placement: Whether the samples were grouped.
        plain_sgd: Whether a run with touched steps used SGD without momentum.
        damage: Predicted damage.
        specificity: Predicted specificity.
        seconds_touched: Recorded wall time of the touched steps.
        estimated_seconds: Predicted wall time of the subtraction: that of reading and adding the deltas once.
        retraining_seconds: Recorded wall time of all steps in these weights.
        recommendation: One paragraph in plain words.
        remaining_methods: Names of methods that can be used.
    """

    request: RequestedSamples
    scale: Scale
    keep: Keep
    state: ModelState | None
    steps: npt.NDArray[np.int64]
    amounts: Mapping[int, float]
    missing_steps: Mapping[int, StepStatus]
    lost_steps: int
    outside_edits: int
    unknown_ids: tuple[SampleId, ...]
    honoured_ids: Mapping[SampleId, str]
    collateral_ids: frozenset[SampleId]
    touched_fraction: float
    mean_share: float
    relative_norm: float
    relative_weight_norm: float
    changed_weights: int
    weights: int
    placement: Placement | None
    plain_sgd: bool
    damage: Damage | None
    specificity: Specificity | None
    seconds_touched: float
    estimated_seconds: float
    retraining_seconds: float
    recommendation: str
    remaining_methods: tuple[str, ...]

    @property
    def refuses(self) -> bool:
        """Whether damage or specificity speak against carrying it out."""
        return "refuse" in (self.damage, self.specificity)

    def check(self, force: bool = False) -> None:
        """Check that the plan can and should be carried out.

        Args:
            force: Carry it out although it refuses, or although the store lost ids. Nothing else is overridden.

        Raises:
            DeletionRequestError: an id is unknown or already forgotten, damaged steps of this training no longer say
                whom they saw, or the plan refuses.
            MissingDeltaError: a needed step has no delta.
        """
        if self.honoured_ids:
            pairs = shorten(f"{one} (entry {entry})" for one, entry in self.honoured_ids.items())
            rule, remedy = "ids that these weights have not forgotten yet", "Leave them out of the request."
            raise DeletionRequestError(expected("sample_ids", rule, pairs, remedy))
        if self.unknown_ids:
            got = f"unknown ids: {shorten(self.unknown_ids)}"
            remedy = (
                "No step in these weights names them: check the identity of the recording. Weights from before a "
                "request whose ids were purged since still hold those samples, and can only be deleted."
            )
            raise DeletionRequestError(expected("sample_ids", "ids that were recorded", got, remedy))
        if self.missing_steps:
            reasons = "; ".join(sorted({REASONS[status] for status in self.missing_steps.values()}))
            remedy = f"They are not there because {reasons}. Use one of {', '.join(self.remaining_methods)}."
            raise MissingDeltaError(
                expected("store", "one with the delta of every touched step", shorten(self.missing_steps), remedy)
            )
        if self.lost_steps and not force:
            remedy = "They may have seen the samples: retrain, or accept that with `force=True`."
            got = f"{self.lost_steps} damaged steps whose ids are lost"
            raise DeletionRequestError(expected("store", "one that knows who was in every step", got, remedy))
        if self.refuses and not force:
            got = f"damage {self.damage!r} and specificity {self.specificity!r}"
            raise DeletionRequestError(expected("request", "one that subtraction can honour", got, self.recommendation))

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, for a table."""
        rows = [("samples", f"{len(self.request.sample_ids):,}")]
        if self.state is not None:
            rows += [
                ("touched steps", f"{len(self.steps):,} of {self.state.n_steps:,} ({self.touched_fraction:.1%})"),
                ("other samples in them", f"{len(self.collateral_ids):,}"),
                ("placement", f"{self.placement}, {self.mean_share:.1%} of the touched batches"),
                ("relative update norm", f"{self.relative_norm:.3f}"),
                ("change of the weights", f"{self.relative_weight_norm:.2%}"),
                ("weights that change", f"{self.changed_weights:,} of {self.weights:,}"),
                ("damage", f"{self.damage}"),
                ("specificity", f"{self.specificity}"),
                ("subtraction takes", f"{self.estimated_seconds:,.2f} s"),
                ("retraining takes", f"{self.retraining_seconds:,.2f} s"),
            ]
            optional = [
                ("unknown ids", len(self.unknown_ids)),
                ("already forgotten", len(self.honoured_ids)),
                ("steps without a delta", len(self.missing_steps)),
                ("damaged steps without ids", self.lost_steps),
                ("edits outside the optimizer", self.outside_edits),
            ]
            rows += [(label, f"{count:,}") for label, count in optional if count]
        return [*rows, ("methods", ", ".join(self.remaining_methods))]

    def __str__(self) -> str:
        return "\n".join([*(f"{label}: {value}" for label, value in self.rows()), self.recommendation])
