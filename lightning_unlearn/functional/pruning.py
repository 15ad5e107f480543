"""Which entries of a change are kept: exact selection of the largest magnitudes, or of random positions.

Layer-wise magnitude pruning of recorded updates follows Gogineni and Nadimi (2024), "Efficient Knowledge Deletion
from Trained Models through Layer-wise Partial Machine Unlearning" (arXiv:2403.07611). Everything here is exact: the
count, the choice, and the order do not depend on the device, the thread count or the library's sorting.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.functional.selection import Selector
from lightning_unlearn.utilities.checks import check_fraction, expected

__all__ = [
    "keep_of",
    "kept_count",
    "largest_entries",
    "random_entries",
    "split_positions",
]


def kept_count(numel: int, keep: float) -> int:
    """Number of entries that a fraction keeps: exactly `ceil(keep * numel)`.

    The product is formed over the fraction's shortest decimal form, so that 0.1 means one tenth and not the binary
    number next to it: float arithmetic would say `ceil(0.1 * 30) == 4`.

    Args:
        numel: Number of entries of the layer, at least 0.
        keep: Fraction in (0, 1].

    Raises:
        ValueError: `keep` is out of range.

    >>> kept_count(30, 0.1), kept_count(31, 0.1), kept_count(5, 1.0), kept_count(0, 0.5)
    (3, 4, 5, 0)
    """
    return math.ceil(Fraction(repr(check_fraction("keep", keep))) * numel)


def keep_of(name: str, keep: float, overrides: Mapping[str, float] | None = None) -> float:
    """Fraction that a layer keeps: that of the first pattern (`fnmatch`, case-sensitive) matching its name, or `keep`.

    >>> keep_of("encoder.bias", 0.1, {"*.bias": 1.0, "encoder.*": 0.5}), keep_of("head.weight", 0.1)
    (1.0, 0.1)
    """
    return next((value for pattern, value in (overrides or {}).items() if fnmatchcase(name, pattern)), keep)


def _check_values(values: Tensor, k: int) -> None:
    if values.ndim != 1 or values.dtype != torch.float32:
        got = (values.dtype, tuple(values.shape))
        raise ValueError(expected("values", "a one-dimensional float32 tensor", got, "Flatten and convert it."))
    if not 0 <= k <= values.numel():
        raise ValueError(expected("k", f"between 0 and the {values.numel()} entries of `values`", k))


def _refuse_non_finite(values: Tensor) -> ValueError:
    bad = int(torch.nonzero(~torch.isfinite(values))[0])
    remedy = "A change that is not finite comes from training that has diverged."
    return ValueError(expected("values", "finite everywhere", f"{float(values[bad])} at position {bad}", remedy))


def largest_entries(values: Tensor, k: int, selector: Selector | None = None) -> Tensor:
    """Positions of the `k` entries of largest magnitude, ascending; of equal magnitudes the lowest position wins.

    An entry that is exactly zero is never kept, so fewer than `k` positions come back where there are fewer non-zero
    entries. Exact and deterministic, on every device.

    Args:
        values: float32 of shape (n,).
        k: How many to keep, from 0 to n.
        selector: Scratch to reuse on the CPU.

    Returns:
        int64 of shape (min(k, non-zero entries),), on the device of `values`.

    Raises:
        ValueError: wrong shape or dtype, `k` out of range, or a value that is not finite.

    >>> largest_entries(torch.tensor([1.0, -3.0, 0.0, 3.0, 2.0]), 3)
    tensor([1, 3, 4])
    >>> largest_entries(torch.tensor([0.0, 0.0, 1.0]), 2)
    tensor([2])
    """
    _check_values(values, k)
    values = values.detach()
    if k == 0 or values.device.type != "cpu":
        if not bool(torch.isfinite(values).all()):
            raise _refuse_non_finite(values)
        return _largest_on_device(values.abs(), k)
    found = (selector or Selector()).select(values.contiguous().numpy(), None, k)
    return torch.from_numpy(found.positions.astype(np.int64, copy=False))


def _largest_on_device(magnitude: Tensor, k: int) -> Tensor:
    k = min(k, int(torch.count_nonzero(magnitude)))
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=magnitude.device)
    # topk alone would leave the choice among equal magnitudes to the device, so only its threshold is used.
    threshold = torch.topk(magnitude, k).values[-1]
    above = torch.nonzero(magnitude > threshold).flatten()
    ties = torch.nonzero(magnitude == threshold).flatten()[: k - above.numel()]
    return torch.cat((above, ties)).sort().values


def split_positions(positions: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Ascending positions in a concatenation of layers -> positions in each of them, of the same dtype.

    >>> split_positions(torch.tensor([1, 2, 4]), [2, 1, 2])
    (tensor([1]), tensor([0]), tensor([1]))
    """
    starts = torch.tensor([0, *itertools.accumulate(sizes)], device=positions.device)
    bounds = torch.searchsorted(positions, starts.to(positions.dtype)).tolist()
    return tuple(
        positions[first:last] - start
        for first, last, start in zip(bounds[:-1], bounds[1:], starts.tolist()[:-1], strict=True)
    )


def random_entries(numel: int, k: int, seed: int | Sequence[int]) -> Tensor:
    """`k` positions drawn uniformly without replacement, ascending; a pure function of its arguments.

    The control for magnitude pruning: it keeps as many entries, but no particular ones. No global random state is
    read or changed.

    Args:
        numel: Number of entries of the layer.
        k: How many to keep, from 0 to `numel`.
        seed: One or several non-negative integers, such as (seed, step, layer).

    Raises:
        ValueError: `k` is out of range.

    >>> random_entries(10, 3, (0, 7)).tolist() == random_entries(10, 3, (0, 7)).tolist()
    True
    """
    if not 0 <= k <= numel:
        raise ValueError(expected("k", f"between 0 and the {numel} entries of the layer", k))
    entropy: Any = seed if isinstance(seed, int) else list(seed)
    drawn = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy))).choice(
        numel, k, replace=False, shuffle=False
    )
    return torch.from_numpy(np.sort(drawn.astype(np.int64)))
