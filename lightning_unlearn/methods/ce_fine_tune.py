"""CE-FT and ICE-FT: cross-entropy against wrong labels as objective, or as penalty of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightning_unlearn.methods.base import hyperparameters
from lightning_unlearn.methods.loss_method import UnlearningHost, user_loss, weighted_sum
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.relabelling import Relabelling
from lightning_unlearn.methods.search_space import Choices, FloatRange, IntRange, SearchSpace
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.checks import check_fraction

__all__ = ["CEFineTune", "ICEFineTune"]


@register
@hyperparameters
class CEFineTune(Relabelling):
    r"""CE-FT: the loss on relabelled forget data is the objective, that on the data to keep the penalty.

    Rule: minimise :math:`L(\theta; x_f, y') + \alpha L(\theta; B_r)` with random wrong labels :math:`y'` (eq. 7 of the
    paper's first version), L the user's own training loss. It is `LabelFlipping` at equal weights for
    :math:`\alpha = 1`, up to the scale of the loss.

    Guarantee: heuristic, as `LabelFlipping`.

    Cost: two forward and backward passes a step.

    Fails: as `LabelFlipping`, and more so, because the forget term weighs at least as much as the other:
    `ICEFineTune` and `KLFineTune`, the paper's remedies, cost less where nothing watches them.

    Differs from the paper: there is no official code to compare with. The structure is confirmed by its public reviews,
    the symbols are not; batches are paired, so an epoch is a pass over the longer part.

    Args:
        alpha: Weight of the retain term, in (0, 1]. 1 (ours: how the paper tunes it is not described), since less was
            measured to cost more.
        labels: `"wrong"` never draws the true class, as the paper has it; `"any"` may.
        draw: `"batch"` or `"sample"`, see `Relabelling`; the paper's choice was not at hand.
        seed: Seed of `draw="sample"`.
        n_classes: Number of classes; counted in the model's logits unless it is given.
        max_steps: Optimizer steps; 50 unless `max_epochs` is given (ours).
        max_epochs: Passes over the longer part instead.
        optimizer: Builds the optimizer; default the user's own, fresh, without schedulers.
        lr_scale: Factor on the user's learning rates; 0.03, because the first steps against wrong labels are large and
            nothing here outweighs them.
        stop: See `PushingMethod`.
        check_every: Steps between two looks at the losses.
        forget_statistics: See `ForgetStatistics`.

    Source: Ding et al. 2024, arXiv 2410.03833, version 1; stopping rule ours.

    >>> CEFineTune().alpha
    1.0
    """

    source: ClassVar[str] = "Ding et al. 2024, arXiv 2410.03833v1"
    # The paper has (0, 1] for alpha; the less, the less holds on to the data to keep.
    search_space: ClassVar[SearchSpace] = {
        "lr_scale": FloatRange(0.003, 0.3, log=True),
        "max_steps": IntRange(10, 150, log=True),
        "alpha": FloatRange(0.1, 1, log=True),
        "stop": Choices(("held_out", "retain", None)),
    }

    alpha: float = 1.0
    lr_scale: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha = check_fraction("alpha", self.alpha)

    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Tensor | None:
        """The user's loss on the relabelled forget part, plus a share of that on the retain part."""
        retain = user_loss(host, "retain", batch, batch_idx)
        forget = self.relabelled_loss(host, batch, batch_idx)
        return weighted_sum((self.alpha, retain), (1.0, forget))


@register
@hyperparameters
class ICEFineTune(Relabelling):
    r"""ICE-FT: fine-tuning on the data to keep, with the loss on relabelled forget data as a penalty.

    Rule: minimise :math:`L(\theta; B_r) + \alpha L(\theta; x_f, y')` with random wrong labels :math:`y'`: `CEFineTune`
    with its terms exchanged.

    Guarantee: heuristic, as `LabelFlipping`.

    Cost: two forward and backward passes a step.

    Fails: as `LabelFlipping`; with a small `alpha` it is fine-tuning, which forgets little.

    Differs from the paper: its formula is never written there ("inverse of CE-FT"), so this is a reading (inferred).

    Args:
        alpha: Weight of the forget term, in (0, 1]. 0.05 (ours: how the paper tunes it is not described).
        labels: `"wrong"` never draws the true class, as the paper has it; `"any"` may.
        draw: `"batch"` or `"sample"`, see `Relabelling`; the paper's choice was not at hand.
        seed: Seed of `draw="sample"`.
        n_classes: Number of classes; counted in the model's logits unless it is given.
        max_steps: Optimizer steps; 50 unless `max_epochs` is given (ours).
        max_epochs: Passes over the longer part instead.
        optimizer: Builds the optimizer; default the user's own, fresh, without schedulers.
        lr_scale: Factor on the user's learning rates; a tenth, because the first steps against wrong labels are large.
        stop: See `PushingMethod`.
        check_every: Steps between two looks at the losses.
        forget_statistics: See `ForgetStatistics`.

    Source: Ding et al. 2024, arXiv 2410.03833, version 1; formula inferred, stopping rule ours.

    >>> ICEFineTune().alpha
    0.05
    """

    source: ClassVar[str] = "Ding et al. 2024, arXiv 2410.03833v1"
    # The paper has (0, 1] for alpha.
    search_space: ClassVar[SearchSpace] = {
        "lr_scale": FloatRange(0.01, 1, log=True),
        "max_steps": IntRange(10, 150, log=True),
        "alpha": FloatRange(0.005, 1, log=True),
        "stop": Choices(("held_out", "retain", None)),
    }

    alpha: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha = check_fraction("alpha", self.alpha)

    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Tensor | None:
        """The user's loss on the retain part, plus a share of that on the relabelled forget part."""
        retain = user_loss(host, "retain", batch, batch_idx)
        forget = self.relabelled_loss(host, batch, batch_idx)
        return weighted_sum((1.0, retain), (self.alpha, forget))
