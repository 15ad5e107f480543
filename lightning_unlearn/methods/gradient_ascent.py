"""Gradient ascent on the data to forget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightning_unlearn.methods.base import Guarantee, Requirement, hyperparameters
from lightning_unlearn.methods.loss_method import PushingMethod, UnlearningHost, user_loss, weighted_sum
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import Choices, FloatRange, IntRange, SearchSpace
from lightning_unlearn.types import Part

__all__ = ["GradientAscent"]


@register
@hyperparameters
class GradientAscent(PushingMethod):
    r"""Raise the user's own training loss on the data to forget (elsewhere also called NegGrad).

    Rule: :math:`\theta \leftarrow \theta + \eta \nabla L(\theta; D_f)`, that is, minimise :math:`-L(\theta; D_f)`.

    Guarantee: heuristic. The objective has no bound, so without a stopping rule the model is destroyed sooner or later;
    nothing in it holds on to the data to keep.

    Cost: `max_steps` steps on the forget data alone.

    Fails: with too many steps or too large a rate; on data that were never memorised (see `PushingMethod`); where the
    forget data are much like the rest, whose loss rises as well.

    Differs from code in use: running statistics of BatchNorm do not follow the forget batches (there the model is in
    train mode, and much of a reported collapse is that); the rate is a share of the user's own.

    Args:
        max_steps: Optimizer steps; 20 unless `max_epochs` is given. Few, because the objective has no bound.
        max_epochs: Passes over the forget data instead.
        optimizer: Builds the optimizer; default the user's own, fresh, without schedulers.
        lr_scale: Factor on the user's learning rates; a tenth, because steps that climb grow as they go.
        stop: See `PushingMethod`.
        check_every: Steps between two looks at the losses.
        forget_statistics: See `ForgetStatistics`.

    Source: Graves et al. 2021, arXiv 2010.10981, and Golatkar et al. 2020, arXiv 1911.04933, use it as a baseline;
    stopping rule ours.

    >>> GradientAscent(max_steps=10).lr_scale
    0.1
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.FORGET_DATA})
    guarantee: ClassVar[Guarantee] = "heuristic"
    source: ClassVar[str] = "Golatkar et al. 2020, arXiv 1911.04933 (as a baseline)"
    parts: ClassVar[tuple[Part, ...]] = ("forget",)
    default_steps: ClassVar[int | None] = 20
    # Without `stop=None`: the loss has no bound and nothing holds on to the data to keep, so unwatched it destroys.
    search_space: ClassVar[SearchSpace] = {
        "lr_scale": FloatRange(0.01, 1, log=True),
        "max_steps": IntRange(5, 60, log=True),
        "stop": Choices(("held_out", "retain")),
    }

    lr_scale: float = 0.1

    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Tensor | None:
        """Minus the user's loss on the forget part."""
        return weighted_sum((-1.0, user_loss(host, "forget", batch, batch_idx)))
