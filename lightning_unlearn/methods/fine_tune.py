"""Fine-tuning on the retain data: the repair after an edit, and the baseline that barely forgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_unlearn.methods.base import Guarantee, Requirement, hyperparameters
from lightning_unlearn.methods.loss_method import LossMethod, UnlearningHost
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import FloatRange, IntRange, SearchSpace
from lightning_unlearn.types import Part

__all__ = ["FineTune"]


@register
@hyperparameters
class FineTune(LossMethod):
    r"""Run the user's own `training_step` on the data to keep, for a while.

    Rule: minimise the user's training loss over the retain data, starting from the current weights.

    Guarantee: heuristic. Alone it forgets little (Ding et al. 2024 show why: nothing in the loss pulls the model away
    from what it knew). After `Amnesiac` or `PartialAmnesiac` it is the repair: measured on small CNNs, 50 steps at a
    third of the learning rate brought test accuracy back to within one or two points.

    Cost: `max_steps` training steps. Works with manual optimization: the user's step runs unchanged.

    Args:
        max_steps: Optimizer steps; 50 unless `max_epochs` is given.
        max_epochs: Passes over the retain data instead.
        optimizer: Builds the optimizer; default the user's own, fresh, without schedulers.
        lr_scale: Factor on the user's learning rates; a third, as measured.

    Source: Ding et al. 2024, arXiv 2410.03833 (analysis).

    >>> FineTune(max_steps=50).max_steps
    50
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.RETAIN_DATA})
    guarantee: ClassVar[Guarantee] = "heuristic"
    source: ClassVar[str] = "Ding et al. 2024, arXiv 2410.03833"
    parts: ClassVar[tuple[Part, ...]] = ("retain",)
    combines_losses: ClassVar[bool] = False
    default_steps: ClassVar[int | None] = 50
    search_space: ClassVar[SearchSpace] = {
        "lr_scale": FloatRange(0.03, 3, log=True),
        "max_steps": IntRange(10, 150, log=True),
    }

    lr_scale: float = 1 / 3

    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Any:
        """The user's step on the retain part, its output unchanged."""
        return host.user_step("retain", batch["retain"], batch_idx)
