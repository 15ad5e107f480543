"""Which entries of a change are kept: exact selection of the largest magnitudes, or of random positions.

Layer-wise magnitude pruning of recorded updates follows Gogineni and Nadimi (2024), "Efficient Knowledge Deletion
from Trained Models through Layer-wise Partial Machine Unlearning" (arXiv:2403.07611). Everything here is exact: the
count, the choice, and the order do not depend on the device, the thread count or the library's sorting.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.functional.selection import Selector
from lightning_unlearn.utilities.checks import check_choice, check_fraction, check_positive_int, expected

__all__ = [
    "DEFAULT_KEEP",
    "FEW_TRAINABLE",
    "Criterion",
    "Keep",
    "PruneWhen",
    "Pruning",
    "keep_of",
    "kept_count",
    "largest_entries",
    "random_entries",
    "split_positions",
]

DEFAULT_KEEP = 0.1
"""Fraction of each layer that is recorded unless told otherwise: what forgetting needs, at a seventh of the damage."""

FEW_TRAINABLE = 0.05
"""Below this share of trainable parameters (adapters, a new head) everything is recorded, as float32."""

Criterion: TypeAlias = Literal["magnitude", "random"]
PruneWhen: TypeAlias = Literal["step", "sum"]


@dataclass(frozen=True, slots=True)
class Pruning:
    """How a sum of recorded changes is pruned, layer by layer.

    Attributes:
        keep: Fraction of each layer, or pattern (`fnmatch`) -> fraction, where the first match wins and layers without
            a match stay as they are; `None` leaves all as they are.
        when: `"step"` prunes the change of every step, `"sum"` only what they add up to.
        criterion: `"magnitude"` keeps the largest entries, `"random"` as many drawn ones.
        seed: For `"random"`; a layer's draw depends on its name, not on its place among the others.

    Raises:
        ValueError: a fraction out of range, or an unknown choice.

    >>> Pruning({"*.bias": 1.0, "*": 0.1}).fraction_of("head.bias"), Pruning(0.5).fraction_of("head.bias")
    (1.0, 0.5)
    """

    keep: float | Mapping[str, float] | None = None
    when: PruneWhen = "step"
    criterion: Criterion = "magnitude"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.keep, Mapping):
            for pattern, value in self.keep.items():
                check_fraction(f"keep[{pattern!r}]", value)
        elif self.keep is not None:
            check_fraction("keep", self.keep)
        check_choice("when", self.when, ("step", "sum"))
        check_choice("criterion", self.criterion, ("magnitude", "random"))
        check_positive_int("seed", self.seed, zero=True)

    @classmethod
    def of(cls, keep: Keep) -> Pruning:
        """A pruning as it is; for a fraction, or fractions by pattern, that of every step by magnitude."""
        return keep if isinstance(keep, Pruning) else cls(keep)

    def fraction_of(self, name: str) -> float:
        """Fraction that is kept of a layer."""
        return keep_of(name, 1.0, self.keep) if isinstance(self.keep, Mapping) else (self.keep or 1.0)

    def positions(self, values: Tensor, k: int, name: str, step: int | None = None) -> Tensor:
        """Positions of the `k` entries that are kept of a layer, ascending.

        Args:
            values: One-dimensional, on the CPU.
            k: How many.
            name: Name of the layer.
            step: The step whose change it is; `None` for a sum.
        """
        if self.criterion == "magnitude":
            return largest_entries(values, k)
        number = zlib.crc32(name.encode())
        return random_entries(values.numel(), k, (self.seed, number) if step is None else (self.seed, number, step))


Keep: TypeAlias = float | Mapping[str, float] | Pruning | None
"""How much of recorded changes is used: a fraction or fractions by pattern of every step's, or as a `Pruning` says."""


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
    if values.ndim != 1 or values.dtype not in (torch.float32, torch.float64):
        got = (values.dtype, tuple(values.shape))
        rule = "a one-dimensional float32 or float64 tensor"
        raise ValueError(expected("values", rule, got, "Flatten and convert it."))
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
        values: float32 or float64 of shape (n,).
        k: How many to keep, from 0 to n.
        selector: Scratch to reuse on the CPU, for float32.

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
    if k == 0 or values.device.type != "cpu" or values.dtype == torch.float64:
        if not bool(torch.isfinite(values).all()):
            raise _refuse_non_finite(values)
        return _largest_by_threshold(values.abs(), k)
    found = (selector or Selector()).select(values.contiguous().numpy(), None, k)
    return torch.from_numpy(found.positions.astype(np.int64, copy=False))


def _largest_by_threshold(magnitude: Tensor, k: int) -> Tensor:
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
