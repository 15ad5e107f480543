"""Which entries of a model's weights are kept, by scores of how much they matter to some data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.functional.pruning import kept_count, largest_entries, split_positions

__all__ = ["kept_masks"]


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
        return [_flat_mask(score.detach().float().flatten(), keep, of).view(score.shape) for score in scores]
    flat = torch.cat([score.detach().float().flatten().cpu() for score in scores])
    positions = torch.nonzero(_flat_mask(flat, keep, of)).flatten()
    masks = []
    for score, places in zip(scores, split_positions(positions, [one.numel() for one in scores]), strict=True):
        mask = torch.zeros(score.numel(), dtype=torch.bool)
        mask[places] = True
        masks.append(mask.view(score.shape).to(score.device))
    return masks


def _flat_mask(scores: Tensor, keep: float, of: str) -> Tensor:
    kept = kept_count(scores.numel(), keep)
    chosen = _largest(scores, kept if of == "largest" else scores.numel() - kept)
    return chosen if of == "largest" else ~chosen


def _largest(scores: Tensor, count: int) -> Tensor:
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[largest_entries(scores, count)] = True
    missing = count - int(chosen.sum())
    if missing:  # the selection passes over zeros
        chosen[torch.nonzero(~chosen).flatten()[:missing]] = True
    return chosen
