"""Label flipping: train on the data to forget with random labels, and on the data to keep with their own."""

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

__all__ = ["LabelFlipping"]


@register
@hyperparameters
class LabelFlipping(Relabelling):
    r"""Run the user's own `training_step` on the data to forget with random labels, and on the data to keep.

    Rule: minimise :math:`a L(\theta; B_r) + (1 - a) L(\theta; x_f, y')` over pairs of batches, :math:`y'` drawn at
    random; the shorter part is cycled.

    Guarantee: heuristic. The model is taught a wrong answer, which is not what a model says that never saw the data.

    Cost: two forward and backward passes a step.

    Fails: on data that were never memorised the model ends further from the retrained one than the untouched one
    (`docs/comparison.md`), and unwatched much further. A loss that wants another kind of labels needs an adapter.

    Differs from code in use: both parts have a batch in every step, so their weights do not depend on their sizes; the
    SSD authors' code shuffles them into one training set, SalUn's passes over the forget part first. Graves et al.
    relabel a whole class once (`draw="sample"`) and train on the modified data.

    Args:
        retain_weight: The weight a of the retain term, from 0 to 1. 0.95 (ours): equal weights destroy where few
            samples are forgotten. The papers train on both parts as on one data set, where the retain part weighs as
            much more as it is larger. 1 is fine-tuning.
        labels: `"wrong"` (Graves et al., SSD authors' code) never draws the true class, `"any"` (SalUn's code) may.
        draw: `"batch"` draws anew for every batch, as SalUn's code does for every epoch; `"sample"` once for a sample,
            as Graves et al., see `Relabelling`.
        seed: Seed of `draw="sample"`.
        n_classes: Number of classes; counted in the model's logits unless it is given.
        max_steps: Optimizer steps; 50 unless `max_epochs` is given (ours: the papers have 3 to 10 epochs).
        max_epochs: Passes over the longer part instead.
        optimizer: Builds the optimizer; default the user's own, fresh, without schedulers.
        lr_scale: Factor on the user's learning rates; a tenth, because the first steps against wrong labels are large.
        stop: See `PushingMethod`.
        check_every: Steps between two looks at the losses.
        forget_statistics: See `ForgetStatistics`.

    Source: Graves et al. 2021, arXiv 2010.10981; stopping rule ours.

    >>> LabelFlipping().labels
    'wrong'
    """

    source: ClassVar[str] = "Graves et al. 2021, arXiv 2010.10981"
    search_space: ClassVar[SearchSpace] = {
        "lr_scale": FloatRange(0.01, 1, log=True),
        "max_steps": IntRange(10, 150, log=True),
        "retain_weight": FloatRange(0.5, 0.99),
        "stop": Choices(("held_out", "retain", None)),
    }

    retain_weight: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        self.retain_weight = check_fraction("retain_weight", self.retain_weight)

    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Tensor | None:
        """The weighted mean of the user's losses on the retain part and on the relabelled forget part."""
        retain = user_loss(host, "retain", batch, batch_idx)
        if self.retain_weight == 1.0:
            return retain
        forget = self.relabelled_loss(host, batch, batch_idx)
        return weighted_sum((self.retain_weight, retain), (1.0 - self.retain_weight, forget))
