"""NegGrad+: descend on the data to keep while ascending on the data to forget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightning_unlearn.methods.base import Guarantee, Requirement, hyperparameters
from lightning_unlearn.methods.loss_method import PushingMethod, UnlearningHost, user_loss, weighted_sum
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import Choices, FloatRange, IntRange, SearchSpace
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.checks import check_fraction

__all__ = ["NegGradPlus"]


@register
@hyperparameters
class NegGradPlus(PushingMethod):
    r"""Lower the user's own training loss on the data to keep and raise it on the data to forget, in every step.

    Rule: minimise :math:`a L(\theta; B_r) - (1 - a) L(\theta; B_f)` over pairs of batches; the forget batches are
    cycled, so an epoch is a pass over the retain data.

    Guarantee: heuristic. It removes most wrong labels at little cost (`docs/comparison.md`); on data that were never
    memorised it over-forgets (see `PushingMethod`).

    Cost: two forward and backward passes a step.

    Fails: the forget term has no bound; with a small `retain_weight` and many steps it takes over.

    Differs from code in use: parts are put through the model one after the other, so statistics of a batch are never
    mixed, and those of the forget part are not learnt; the paper's code does the former as well.

    Args:
        retain_weight: The weight a of the retain term, from 0 to 1. 0.9 (ours, chosen on small models); the paper has
            0.95 there and 0.9999 on large ones. 1 is fine-tuning.
        max_steps: Optimizer steps; 50 unless `max_epochs` is given (ours).
        max_epochs: Passes over the retain data instead.
        optimizer: Builds the optimizer; default the user's own, fresh, without schedulers.
        lr_scale: Factor on the user's learning rates; a third, as for the repair it contains.
        stop: See `PushingMethod`.
        check_every: Steps between two looks at the losses.
        forget_statistics: See `ForgetStatistics`.

    Source: Kurmanji et al. 2023, arXiv 2302.09880; stopping rule ours.

    >>> NegGradPlus().retain_weight
    0.9
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.FORGET_DATA, Requirement.RETAIN_DATA})
    guarantee: ClassVar[Guarantee] = "heuristic"
    source: ClassVar[str] = "Kurmanji et al. 2023, arXiv 2302.09880"
    parts: ClassVar[tuple[Part, ...]] = ("forget", "retain")
    default_steps: ClassVar[int | None] = 50
    # The paper's two weights, 0.95 and 0.9999, are in the range; its rule is `stop=None`.
    search_space: ClassVar[SearchSpace] = {
        "lr_scale": FloatRange(0.03, 3, log=True),
        "max_steps": IntRange(10, 150, log=True),
        "retain_weight": FloatRange(0.5, 0.9999),
        "stop": Choices(("held_out", "retain", None)),
    }

    retain_weight: float = 0.9
    lr_scale: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.retain_weight = check_fraction("retain_weight", self.retain_weight)

    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Tensor | None:
        """The weighted difference of the user's losses on both parts."""
        retain = user_loss(host, "retain", batch, batch_idx)
        if self.retain_weight == 1.0:
            return retain
        forget = user_loss(host, "forget", batch, batch_idx)
        return weighted_sum((self.retain_weight, retain), (self.retain_weight - 1.0, forget))
