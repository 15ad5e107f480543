"""Which entries of a model's weights are kept, by scores of how much they matter to some data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.functional.curvature import unflatten
from lightning_unlearn.functional.pruning import kept_count, largest_entries

__all__ = ["kept_masks", "largest_masks"]


def kept_masks(
    scores: Sequence[Tensor],
    keep: float,
    *,
    of: Literal["largest", "smallest"] = "largest",
    scope: Literal["layer", "global"] = "layer",
) -> list[Tensor]:
    r"""Masks of exactly :math:`\lceil keep \cdot n \rceil` entries with the largest or the smallest scores.

    Of equal scores the first is kept among the largest, and dropped among the smallest.

    Args:
        scores: Non-negative, of any shapes.
        keep: Share of the entries, in (0, 1].
        of: Which end of the order is kept.
        scope: One threshold for each tensor, or one for all of them together.

    Returns:
        Bool masks of the same shapes, on the same devices.

    Raises:
        ValueError: `keep` is out of range, or a score is not finite.

    >>> scores = [torch.tensor([3.0, 1.0]), torch.tensor([5.0, 4.0])]
    >>> [mask.tolist() for mask in kept_masks(scores, 0.5)]
    [[True, False], [True, False]]
    >>> [mask.tolist() for mask in kept_masks(scores, 0.5, of="smallest", scope="global")]
    [[True, True], [False, False]]
    """
    if scope == "layer":
        return [mask for score in scores for mask in kept_masks([score], keep, of=of, scope="global")]
    n = sum(score.numel() for score in scores)
    kept = kept_count(n, keep)
    chosen = largest_masks(scores, kept if of == "largest" else n - kept)
    return chosen if of == "largest" else [~mask for mask in chosen]


def largest_masks(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of exactly `count` entries with the largest magnitudes, by one threshold over all tensors together.

    Of equal magnitudes the first wins, and where fewer entries are not zero the first of the others fill up.

    Args:
        scores: Any shapes.
        count: How many, at most as many as there are.

    Returns:
        Bool masks of the same shapes, on the same devices.

    Raises:
        ValueError: `count` is out of range, or a score is not finite.

    >>> [mask.tolist() for mask in largest_masks([torch.tensor([1.0, -3.0]), torch.tensor([2.0, 0.0])], 2)]
    [[False, True], [True, False]]
    """
    flat = torch.cat([score.detach().float().flatten().to(scores[0].device) for score in scores])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[largest_entries(flat, count)] = True
    missing = count - int(chosen.sum())
    if missing:  # the selection passes over zeros
        chosen[torch.nonzero(~chosen).flatten()[:missing]] = True
    return [mask.to(score.device) for mask, score in zip(unflatten(chosen, scores), scores, strict=True)]
