"""KLOM: how far the margins of unlearned models are distributed from those of retrained ones, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.functional.margins import MARGIN_LIMIT, checked_groups
from lightning_unlearn.utilities.checks import check_fraction, check_positive_int

__all__ = ["klom"]


def _histograms(values: Tensor, edges: Tensor, *, closed: bool) -> Tensor:
    """Shares of (models, samples) values in the bins between (samples, bins + 1) edges, as (samples, bins)."""
    bins = edges.shape[1] - 1
    # One bin more, for the upper edge itself.
    places = torch.searchsorted(edges, values.T.contiguous(), right=True) - 1
    counts = torch.zeros(edges.shape, dtype=torch.float64, device=values.device)
    counts.scatter_add_(1, places.clamp(0, bins), torch.ones_like(places, dtype=torch.float64))
    if closed:
        counts[:, bins - 1] += counts[:, bins]
    counts = counts[:, :bins]
    return counts / counts.sum(dim=1, keepdim=True)


def klom(
    unlearned: Tensor,
    retrained: Tensor,
    *,
    bins: int = 20,
    clip: float = MARGIN_LIMIT,
    epsilon: float = 1e-5,
    closed: bool = True,
) -> Tensor:
    r"""KL(unlearned || retrained) of the histograms of margins, per sample, in nats.

    For every sample both groups of models are put into equal bins over their joint range; the retrained group's share
    is raised to `epsilon` where only the unlearned group has any, and scaled to sum to one. 0 says that no bin tells
    the groups apart. **Groups of the same distribution are not at 0**: with few models a bin that happens to be empty
    costs up to ln(1 / epsilon) times its share. Measure that floor by giving one half of the retrained models as
    `unlearned`.

    Guarantee: heuristic, a distance of outputs on the samples given. Source: Georgiev et al. 2024 (arXiv 2410.23232),
    with the constants of the code that its authors published. That code leaves the largest margin of the two groups
    out of its histogram; `closed=False` does the same, and gives NaN where that empties one.

    Args:
        unlearned: Margins (see :func:`lightning_unlearn.functional.margins.margins`), (models, samples).
        retrained: Margins of models that never saw the forget set, (models, samples); as many models or not.
        bins: How many.
        clip: Margins are clipped to [-clip, clip].
        epsilon: Smallest share of the retrained group where the unlearned group has one.
        closed: Whether the last bin holds its upper edge.

    Returns:
        float64 of shape (samples,).

    Raises:
        ValueError: shapes do not fit, a group is empty, a margin is NaN, or an option is out of range.

    >>> near, far = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [9.0]])
    >>> [round(float(klom(one, near)), 3) for one in (near, far)]
    [0.0, 5.41]
    """
    check_positive_int("bins", bins)
    check_fraction("epsilon", epsilon)
    unlearned, retrained = checked_groups(unlearned, retrained, clip=clip, fewest=1)
    low, high = torch.cat([unlearned, retrained]).aminmax(dim=0)
    high = torch.where(low == high, low + 1, high)
    edges = torch.arange(bins + 1, dtype=torch.float64, device=low.device) * ((high - low) / bins).unsqueeze(1)
    edges += low.unsqueeze(1)
    edges[:, -1] = high  # exactly, or the largest value may fall out
    p, q = (_histograms(group, edges, closed=closed) for group in (unlearned, retrained))
    q = torch.where(p > 0, q.clamp_min(epsilon), q)
    q = q / q.sum(dim=1, keepdim=True)
    # An empty bin of the unlearned group adds nothing, whatever the other holds.
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(dim=1).clamp_min(0.0)
