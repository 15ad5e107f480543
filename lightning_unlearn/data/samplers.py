"""Samplers for one part of a split: the user's own policy filtered, and a sharded one that may cycle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch.utils.data import DistributedSampler, Sampler

from lightning_unlearn.utilities.modes import isolated_rng

__all__ = ["CyclingDistributedSampler", "FilteredBatchSampler", "FilteredSampler"]

T = TypeVar("T")


class _Filtered(Sampler[T]):
    """Passes of a policy with some positions left out, always `len(self)` items long.

    The length is what one pass gives, counted once. A policy that draws with replacement gives a little more or less
    each time; such a pass is cut, or continued with the next one, so that the declared length holds.
    """

    def __init__(self, policy: Iterable[Any], keep: Callable[[Any], T | None]) -> None:
        self._policy = policy
        self._keep = keep
        with isolated_rng():
            self._length = sum(1 for _ in self._one_pass())

    def _one_pass(self) -> Iterator[T]:
        return (kept for item in self._policy if (kept := self._keep(item)) is not None)

    def __iter__(self) -> Iterator[T]:
        left = self._length
        while left:
            before = left
            for item in self._one_pass():
                yield item
                left -= 1
                if not left:
                    return
            if left == before:
                return  # nothing of the part was drawn at all: end rather than hang

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the policy, where it wants one."""
        for policy in (self._policy, getattr(self._policy, "sampler", None)):
            if callable(set_epoch := getattr(policy, "set_epoch", None)):
                set_epoch(epoch)
                return


class FilteredSampler(_Filtered[int]):
    """A user's sampler without the positions outside `positions`, in the user's order.

    Args:
        policy: The user's sampler; yields positions of the whole dataset.
        positions: Positions to let through; yielded as indices into this sequence, for a `Subset` of it.

    >>> list(FilteredSampler([4, 3, 2, 1, 0], positions=[0, 3]))
    [1, 0]
    """

    def __init__(self, policy: Iterable[int], positions: Sequence[int]) -> None:
        place = {position: index for index, position in enumerate(positions)}
        super().__init__(policy, lambda position: place.get(int(position)))


class FilteredBatchSampler(_Filtered[list[int]]):
    """A user's batch sampler with its batches thinned to `positions`; batches left empty are skipped.

    Args:
        policy: The user's batch sampler; yields lists of positions of the whole dataset.
        positions: Positions to let through; yielded as indices into this sequence, for a `Subset` of it.

    >>> list(FilteredBatchSampler([[0, 1], [2, 3], [4]], positions=[0, 1, 4]))
    [[0, 1], [2]]
    """

    def __init__(self, policy: Iterable[Sequence[int]], positions: Sequence[int]) -> None:
        place = {position: index for index, position in enumerate(positions)}
        super().__init__(policy, lambda batch: [place[i] for i in map(int, batch) if i in place] or None)

    @property
    def sampler(self) -> FilteredBatchSampler:
        """This object, so that Lightning's `set_epoch` finds its way to the user's policy."""
        return self


class CyclingDistributedSampler(DistributedSampler[T]):
    """A `DistributedSampler` that draws a new permutation on every pass, not only in every epoch.

    In a joint pass the shorter part is gone through several times within one epoch of the Trainer, which announces
    only its own epochs; the plain class would repeat one permutation. Shards of the ranks stay disjoint in every
    pass, apart from the samples that even them out.
    """

    _pass = 0
    _PASSES = 100_003  # a prime: (epoch, pass) pairs do not collide before that many passes

    def set_epoch(self, epoch: int) -> None:
        """Start a new epoch of the Trainer."""
        super().set_epoch(epoch)
        self._pass = 0

    def __iter__(self) -> Iterator[T]:
        epoch = self.epoch
        self.epoch = epoch * self._PASSES + self._pass
        self._pass += 1
        try:
            return iter(list(super().__iter__()))
        finally:
            self.epoch = epoch
