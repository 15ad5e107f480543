"""Gradient ascent with layer-wise partial updates (Gogineni & Nadimi 2024, Algorithm 3)."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from lightning_unlearn.methods.base import hyperparameters
from lightning_unlearn.methods.gradient_ascent import GradientAscent
from lightning_unlearn.methods.partial_updates import MaskPolicy, PartialUpdates
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import FloatRange, SearchSpace

__all__ = ["PartialGradientAscent"]


@register
@hyperparameters
class PartialGradientAscent(GradientAscent):
    r"""Gradient ascent on the data to forget of which every step changes only a share of each layer's entries.

    Rule: as `GradientAscent`, with :math:`\theta_l \leftarrow \theta_l + S_l \odot u_l`: :math:`u_l` is the optimizer's
    update of layer l and the mask :math:`S_l` holds exactly :math:`\lceil fraction \cdot n_l \rceil` entries. With
    `fraction=1` it is `GradientAscent` bit for bit.

    Guarantee: heuristic. Smaller steps do less damage and forget less; the objective stays without a bound.

    Cost: `max_steps` steps on the forget data alone, and a selection over every layer's gradient in each.

    Fails: as `GradientAscent`.

    What is the paper's and what is ours: "optimization-based unlearning" with partial updates layer by layer is its
    Algorithm 3. What it optimizes was not at hand; gradient ascent is a first guess from later work of the same group
    (inferred), as are the choice of entries and the share. For another objective restrict another method with
    `with_updates`, such as `NegGradPlus().with_updates(PartialUpdates(0.1))`.

    Args:
        fraction: Share of each layer that a step may change; a tenth (ours).
        mask: Which entries, see `PartialUpdates`.
        mask_seed: Seed of random masks.
        max_steps: Optimizer steps; 20 unless `max_epochs` is given.
        max_epochs: Passes over the forget data instead.
        optimizer: See `GradientAscent`.
        lr_scale: See `GradientAscent`.
        stop: See `PushingMethod`.
        check_every: Steps between two looks at the losses.
        forget_statistics: See `ForgetStatistics`.

    Source: Gogineni & Nadimi 2024, arXiv 2403.07611 (Algorithm 3; details inferred), stopping rule ours.

    >>> PartialGradientAscent(fraction=0.2, mask="cyclic").updates.mask
    'cyclic'
    """

    source: ClassVar[str] = "Gogineni & Nadimi 2024, arXiv 2403.07611"
    # The paper's fractions were not at hand.
    search_space: ClassVar[SearchSpace] = {
        **GradientAscent.search_space,
        "fraction": FloatRange(0.01, 1, log=True),
    }

    fraction: float = field(default=0.1, repr=False)
    mask: MaskPolicy = field(default="magnitude", repr=False)
    mask_seed: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.updates = PartialUpdates(self.fraction, self.mask, seed=self.mask_seed)
