"""Layer-wise pruned amnesiac unlearning (Gogineni & Nadimi 2024, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.methods.amnesiac import planned_amounts
from lightning_unlearn.methods.base import EditContext, Guarantee, Requirement, WeightEdit
from lightning_unlearn.methods.registry import register
from lightning_unlearn.types import Scale, WeightChange
from lightning_unlearn.utilities.checks import check_choice, check_fraction, expected

__all__ = ["PartialAmnesiac"]


@register
class PartialAmnesiac(WeightEdit):
    r"""Subtract, of every touched step, only the largest entries of each layer's change.

    Rule: :math:`\theta_u = \theta - \sum_{t \in S} P_\rho(\Delta_t)`, where :math:`P_\rho` keeps the
    :math:`\lceil \rho n_l \rceil` entries of largest magnitude of every layer `l`. The store already holds pruned
    deltas; `keep` prunes them further.

    Guarantee: approximate, as `Amnesiac`; pruning trades forgetting for accuracy. Measured on small CNNs, keep = 0.1
    held about 85 % of the forgetting at a seventh of the damage, keep = 0.01 did almost nothing.

    Cost: one pass over the touched records; no training.

    What is the paper's and what is ours: that updates are pruned layer by layer, stored during training and
    subtracted later is the paper's Algorithm 1. Its pruning criterion and fractions were not available to us:
    magnitude, per tensor, per step is our reading (INFERRED), so all of it is a parameter here or of the recorder.

    Args:
        keep: Fraction of each layer to subtract, or pattern -> fraction; `None` takes the store's. At most the
            store's own fraction.
        scale: As for `Amnesiac`.

    Source: Gogineni & Nadimi 2024, arXiv 2403.07611.

    >>> PartialAmnesiac(keep=0.1)
    PartialAmnesiac(keep=0.1, scale='step')
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.DELTAS})
    guarantee: ClassVar[Guarantee] = "approximate"
    source: ClassVar[str] = "Gogineni & Nadimi 2024, arXiv 2403.07611"

    def __init__(self, *, keep: float | Mapping[str, float] | None = None, scale: Scale = "step") -> None:
        if isinstance(keep, Mapping):
            keep = {pattern: check_fraction(f"keep[{pattern!r}]", value) for pattern, value in keep.items()}
        elif keep is not None:
            keep = check_fraction("keep", keep)
        self._keep = keep
        self._scale: Scale = check_choice("scale", scale, ("step", "share"))

    @property
    def scale(self) -> Scale:
        """How much of a touched step is subtracted."""
        return self._scale

    @property
    def keep(self) -> float | Mapping[str, float] | None:
        """How far the stored deltas are pruned further."""
        return self._keep

    @property
    def settings(self) -> dict[str, object]:
        """The hyper-parameters."""
        return {"keep": self._keep, "scale": self._scale}

    def compute_edit(self, context: EditContext) -> WeightChange:
        """Minus the sum of the planned, pruned deltas, float64.

        Raises:
            MissingRequirementError: no store or plan.
            MissingDeltaError: a planned step has no delta.
            ValueError: `keep` is larger than what the store holds.
        """
        store, amounts = planned_amounts(self, context)
        stored = max([store.settings.keep, *store.settings.keep_overrides.values()])
        asked = max(self._keep.values(), default=None) if isinstance(self._keep, Mapping) else self._keep
        if asked is not None and asked > stored:
            raise ValueError(expected("keep", f"at most {stored}, what the store holds", asked, "Use keep=None."))
        return {name: -total for name, total in accumulate(store, amounts, keep=self._keep).items()}
