"""Fine-tuning on the retain data: the repair after an edit, and the baseline that barely forgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_unlearn.methods.base import Guarantee, Requirement
from lightning_unlearn.methods.loss_method import LossMethod, OptimizerFactory, UnlearningHost
from lightning_unlearn.methods.registry import register
from lightning_unlearn.types import Part

__all__ = ["FineTune"]


@register
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

    def __init__(
        self,
        *,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_scale: float = 1 / 3,
    ) -> None:
        if max_steps is None and max_epochs is None:
            max_steps = 50
        super().__init__(max_steps=max_steps, max_epochs=max_epochs, optimizer=optimizer, lr_scale=lr_scale)

    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Any:
        """The user's step on the retain part, its output unchanged."""
        return host.user_step("retain", batch["retain"], batch_idx)
