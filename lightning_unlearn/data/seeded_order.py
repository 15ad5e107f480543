"""The order of an epoch, drawn under a seed of its own, in which every index knows its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lightning_unlearn.utilities.rng import seeded_generators

__all__ = ["DrawnIndex", "Place", "SeededOrder", "indices_in", "place_of"]


class Place(NamedTuple):
    """A batch as the user's sampler drew it.

    Attributes:
        epoch: Epoch, from 0.
        ordinal: Which batch of the epoch, from 0.
        size: Number of its indices.
    """

    epoch: int
    ordinal: int
    size: int


class DrawnIndex(int):
    """An index that knows where it was drawn.

    Attributes:
        own: The index as the user's sampler gave it.
        place: The batch it was drawn for.
        occurrence: How often it was drawn before in this epoch: samples that are drawn again are augmented anew.
    """

    own: Any
    place: Place
    occurrence: int

    @classmethod
    def of(cls, own: Any, place: Place, occurrence: int) -> DrawnIndex:
        """The index `own`, drawn for a batch."""
        drawn = cls(own)
        drawn.own, drawn.place, drawn.occurrence = own, place, occurrence
        return drawn


def indices_in(item: Any) -> Sequence[Any]:
    """The indices in what a sampler or batch sampler yields: a list of them, or a single one.

    >>> indices_in([3, 4]), indices_in(5)
    ([3, 4], [5])
    """
    return item if isinstance(item, Sequence) else [item]


def place_of(item: Any) -> Place:
    """The place of a batch of `SeededOrder`, also of one that was thinned."""
    place: Place = indices_in(item)[0].place
    return place


class SeededOrder:
    """A sampler or batch sampler whose epochs are drawn under seeds of their own.

    Args:
        own: The sampler or batch sampler. What state it has beside the global generators is its own to advance.
        seed: Seed.
        epoch: The epoch that is to be drawn.
        until: Epoch and ordinal of the last batch; later ones are not drawn.

    >>> order = SeededOrder([[0, 1], [2]], 0, lambda: 4)
    >>> [(batch, place_of(batch)) for batch in order][1]
    ([2], Place(epoch=4, ordinal=1, size=1))
    """

    def __init__(self, own: Any, seed: int, epoch: Callable[[], int], until: tuple[int, int] | None = None) -> None:
        self._own, self._seed, self._epoch, self._until = own, seed, epoch, until

    def __iter__(self) -> Iterator[Any]:
        # Drawn at the first `next`, as torch's own samplers do: some loaders make an iterator and never use it.
        epoch = self._epoch()
        with seeded_generators(self._seed, "order", epoch):
            items = list(self._own)
        if self._until is not None and epoch >= self._until[0]:
            items = items[: self._until[1] + 1] if epoch == self._until[0] else []
        times: Counter[int] = Counter()
        for ordinal, item in enumerate(items):
            indices = indices_in(item)
            place = Place(epoch, ordinal, len(indices))
            drawn = []
            for index in indices:
                drawn.append(DrawnIndex.of(index, place, times[int(index)]))
                times[int(index)] += 1
            yield drawn if isinstance(item, Sequence) else drawn[0]

    def __len__(self) -> int:
        return len(self._own)
