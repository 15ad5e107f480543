"""Which weights matter to some data: a threshold over all layers together, and selective dampening."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from lightning_unlearn.functional.retention import largest_masks
from lightning_unlearn.utilities.checks import check_fraction

__all__ = ["alpha_of_share", "dampening_factors", "saliency_masks"]


def saliency_masks(scores: Sequence[Tensor], density: float) -> list[Tensor]:
    r"""The share of entries with the largest magnitudes, by one threshold over all tensors together.

    Exactly :math:`\lfloor density \cdot P \rfloor` of all P entries are chosen (the product of the shortest decimal
    form of `density`, so that 0.29 of 100 are 29). Of equal magnitudes the first wins, and where fewer entries are not
    zero the first of the others fill up.

    Args:
        scores: Any shapes, finite.
        density: Share, in (0, 1].

    Returns:
        Bool tensors of the same shapes.

    Raises:
        ValueError: `density` is out of range, or a score is not finite.

    >>> [mask.tolist() for mask in saliency_masks([torch.tensor([1.0, -3.0]), torch.tensor([2.0, 0.0])], 0.5)]
    [[False, True], [True, False]]
    """
    total = sum(one.numel() for one in scores)
    return largest_masks(scores, math.floor(Fraction(repr(check_fraction("density", density))) * total))


def alpha_of_share(forget: Tensor, whole: Tensor, share: float) -> float:
    r"""The `alpha` of `dampening_factors` by which a share of the weights is selected.

    They are the :math:`\lfloor share \cdot P \rfloor` of the P weights, one at least, with the largest ratio of the
    importances; fewer where the last ones have the same.

    >>> forget, whole = torch.tensor([4.0, 3.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    >>> alpha_of_share(forget, whole, 0.5)
    2.0
    """
    count = max(1, math.floor(Fraction(repr(check_fraction("share", share))) * forget.numel()))
    if count >= forget.numel():
        return 0.0
    ratio = torch.where(whole > 0, forget.double() / whole, 0.0)
    return float(ratio.topk(count + 1).values[-1])


def dampening_factors(forget: Tensor, whole: Tensor, *, alpha: float, strength: float) -> Tensor:
    r"""What to multiply weights by that matter far more to the data to forget than to all data.

    :math:`\beta_i = \min(strength \cdot I_D[i] / I_{D_f}[i], 1)` where :math:`I_{D_f}[i] > alpha \cdot I_D[i]`, else 1.

    Args:
        forget: Importances for the data to forget, non-negative.
        whole: Importances for all data.
        alpha: How far the former must exceed the latter.
        strength: The papers' lambda.

    Returns:
        Factors in [0, 1].

    >>> dampening_factors(torch.tensor([8.0, 1.0, 0.0]), torch.tensor([2.0, 1.0, 0.0]), alpha=2.0, strength=1.0)
    tensor([0.2500, 1.0000, 1.0000])
    """
    selected = forget.double() > alpha * whole.double()
    # What is selected has a divisor above zero; the NaN and infinities of the others are not taken.
    return torch.where(selected, (strength * whole / forget).clamp(max=1.0), 1.0)
