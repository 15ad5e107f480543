"""Label flipping with layer-wise partial updates (Gogineni & Nadimi 2024, Algorithm 2)."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from lightning_unlearn.methods.base import hyperparameters
from lightning_unlearn.methods.label_flipping import LabelFlipping
from lightning_unlearn.methods.partial_updates import MaskPolicy, PartialUpdates
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import FloatRange, SearchSpace

__all__ = ["PartialLabelFlipping"]


@register
@hyperparameters
class PartialLabelFlipping(LabelFlipping):
    r"""Label flipping of which every step changes only a share of each layer's entries.

    Rule: as `LabelFlipping`, with :math:`\theta_l \leftarrow \theta_l + S_l \odot u_l`: :math:`u_l` is the optimizer's
    update of layer l and the mask :math:`S_l` holds exactly :math:`\lceil fraction \cdot n_l \rceil` entries. With
    `fraction=1` it is `LabelFlipping` bit for bit.

    Guarantee: heuristic. Smaller steps do less damage and forget less.

    Cost: as `LabelFlipping`; the masks take a selection over every layer's gradient in each step.

    Fails: as `LabelFlipping`; with small fractions and few steps hardly anything changes.

    What is the paper's and what is ours: label flipping with partial updates layer by layer is its Algorithm 2. Which
    entries, which share, whether data to keep take part, and how labels are drawn, were not at hand (inferred), so they
    are parameters. Masks hold for the update, whatever momentum or weight decay would do.

    Args:
        fraction: Share of each layer that a step may change; a tenth (ours).
        mask: Which entries, see `PartialUpdates`.
        mask_seed: Seed of random masks.
        retain_weight: See `LabelFlipping`.
        labels: See `LabelFlipping`.
        draw: See `LabelFlipping`.
        seed: Seed of `draw="sample"`.
        n_classes: See `LabelFlipping`.
        max_steps: Optimizer steps; 50 unless `max_epochs` is given.
        max_epochs: Passes over the longer part instead.
        optimizer: See `LabelFlipping`.
        lr_scale: See `LabelFlipping`.
        stop: See `PushingMethod`.
        check_every: Steps between two looks at the losses.
        forget_statistics: See `ForgetStatistics`.

    Source: Gogineni & Nadimi 2024, arXiv 2403.07611 (Algorithm 2; details inferred), stopping rule ours.

    >>> PartialLabelFlipping(fraction=0.2).updates.fraction
    0.2
    """

    source: ClassVar[str] = "Gogineni & Nadimi 2024, arXiv 2403.07611"
    # The paper's fractions were not at hand.
    search_space: ClassVar[SearchSpace] = {
        **LabelFlipping.search_space,
        "fraction": FloatRange(0.01, 1, log=True),
    }

    fraction: float = field(default=0.1, repr=False)
    mask: MaskPolicy = field(default="magnitude", repr=False)
    mask_seed: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.updates = PartialUpdates(self.fraction, self.mask, seed=self.mask_seed)
