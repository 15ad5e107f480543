"""Layer-wise pruned amnesiac unlearning (Gogineni & Nadimi 2024, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.functional.pruning import Criterion, Keep, PruneWhen, Pruning
from lightning_unlearn.methods.amnesiac import planned_amounts
from lightning_unlearn.methods.base import EditContext, Guarantee, Requirement, WeightEdit
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import Choices, SearchSpace
from lightning_unlearn.types import Scale, WeightChange
from lightning_unlearn.utilities.checks import check_choice, check_fraction, check_positive_int, expected

__all__ = ["PartialAmnesiac"]


@register
class PartialAmnesiac(WeightEdit):
    r"""Subtract only a share of each layer's recorded change: of every touched step, or of what they add up to.

    Rule: :math:`\theta_u = \theta - \sum_{t \in S} P_\rho(\Delta_t)`, or with `prune="sum"`
    :math:`\theta_u = \theta - P_\rho(\sum_{t \in S} \Delta_t)`, where :math:`P_\rho` keeps exactly
    :math:`\lceil \rho n_l \rceil` entries of every layer `l`. The store may hold pruned deltas already; `keep` prunes
    them further.

    Guarantee: approximate, as `Amnesiac`; pruning trades forgetting for accuracy. Measured on small CNNs with
    `prune="step"`, keep = 0.1 held about 85 % of the forgetting at a seventh of the damage, keep = 0.01 did almost
    nothing. With `prune="sum"` at most that share of each layer changes at all, whatever the number of steps; the
    plan says how many weights it is.

    Cost: one pass over the touched records; no training.

    Fails: as `Amnesiac`. With `prune="sum"` requests one after the other are pruned one by one, so they do not add up
    to one request for all of them, unless everything is kept.

    What is the paper's and what is ours: that updates are pruned layer by layer during training, stored, and subtracted
    later is the paper's Algorithm 1, which is `prune="step"`. Its pruning criterion and fractions were not at hand:
    magnitude per tensor is our reading (inferred). Pruning the sum is ours.

    Args:
        keep: Fraction of each layer to subtract, or pattern -> fraction; `None` takes the store's. At most the
            store's own fraction.
        prune: `"step"`, as in the paper, prunes the change of every step; `"sum"` once what they add up to, which
            takes a store with keep=1.0.
        criterion: `"magnitude"` keeps the largest entries, `"random"` as many drawn ones, the control for it.
        mask_seed: For `criterion="random"`; a layer's draw depends on its name, not on its place among the others.
        scale: As for `Amnesiac`.

    Source: Gogineni & Nadimi 2024, arXiv 2403.07611.

    >>> PartialAmnesiac(keep=0.1, prune="sum").settings
    {'keep': 0.1, 'prune': 'sum', 'criterion': 'magnitude', 'mask_seed': 0, 'scale': 'step'}
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.DELTAS})
    guarantee: ClassVar[Guarantee] = "approximate"
    source: ClassVar[str] = "Gogineni & Nadimi 2024, arXiv 2403.07611"
    # None is the store's fraction; a larger one than that is refused. `prune="sum"` would need another store, and
    # `criterion="random"` is a control, so neither is tuned.
    search_space: ClassVar[SearchSpace] = {
        "keep": Choices((None, 0.03, 0.1, 0.3)),
        "scale": Choices(("step", "share")),
    }

    def __init__(
        self,
        *,
        keep: float | Mapping[str, float] | None = None,
        prune: PruneWhen = "step",
        criterion: Criterion = "magnitude",
        mask_seed: int = 0,
        scale: Scale = "step",
    ) -> None:
        if isinstance(keep, Mapping):
            keep = {pattern: check_fraction(f"keep[{pattern!r}]", value) for pattern, value in keep.items()}
        elif keep is not None:
            keep = check_fraction("keep", keep)
        self._keep = keep
        self._prune: PruneWhen = check_choice("prune", prune, ("step", "sum"))
        self._criterion: Criterion = check_choice("criterion", criterion, ("magnitude", "random"))
        self._mask_seed = check_positive_int("mask_seed", mask_seed, zero=True)
        self._scale: Scale = check_choice("scale", scale, ("step", "share"))

    @property
    def scale(self) -> Scale:
        """How much of a touched step is subtracted."""
        return self._scale

    @property
    def keep(self) -> Keep:
        """How far the stored deltas, or their sum, are pruned further."""
        if (self._prune, self._criterion) == ("step", "magnitude"):
            return self._keep
        return Pruning(self._keep, self._prune, self._criterion, self._mask_seed)

    @property
    def settings(self) -> dict[str, object]:
        """The hyper-parameters."""
        return {
            "keep": self._keep,
            "prune": self._prune,
            "criterion": self._criterion,
            "mask_seed": self._mask_seed,
            "scale": self._scale,
        }

    def missing(self, available: Iterable[Requirement]) -> list[Requirement]:
        """As the base, and unpruned deltas where their sum is to be pruned."""
        present = set(available)
        needed = self.requires | ({Requirement.DENSE_DELTAS} if self._prune == "sum" else set())
        return [requirement for requirement in Requirement if requirement in needed - present]

    def compute_edit(self, context: EditContext) -> WeightChange:
        """Minus the sum of the planned deltas, pruned before or after they are added up, float64.

        Raises:
            MissingRequirementError: no store or plan, or the sum is to be pruned of deltas that are pruned already.
            MissingDeltaError: a planned step has no delta.
            ValueError: `keep` is larger than what the store holds.
        """
        store, amounts = planned_amounts(self, context)
        stored = max([store.settings.keep, *store.settings.keep_overrides.values()])
        asked = max(self._keep.values(), default=None) if isinstance(self._keep, Mapping) else self._keep
        if asked is not None and asked > stored:
            raise ValueError(expected("keep", f"at most {stored}, what the store holds", asked, "Use keep=None."))
        return {name: -total for name, total in accumulate(store, amounts, keep=self.keep).items()}
