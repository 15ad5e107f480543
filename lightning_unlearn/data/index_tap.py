"""Which indices are behind the batch that a loader has just delivered."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_unlearn.data.loader_view import loader_view, release_workers
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected

__all__ = ["IndexTap", "check_tappable"]

_REMEDY = "Pass `sample_id=` (a key of the batch, or a function of it), so that batches say themselves who is in them."


def check_tappable(loader: Any) -> None:
    """Raise where the indices behind a batch cannot be known.

    Raises:
        UnsupportedStrategyError: not a `DataLoader`, iterable data, or workers that deliver out of order.

    >>> check_tappable(DataLoader([1, 2]))
    """
    name = "train_dataloader"
    if not isinstance(loader, DataLoader):
        raise UnsupportedStrategyError(expected(name, "a map-style DataLoader", type(loader).__name__, _REMEDY))
    if isinstance(loader.dataset, IterableDataset):
        got = f"a DataLoader over the iterable {type(loader.dataset).__name__}"
        raise UnsupportedStrategyError(expected(name, "a DataLoader over map-style data", got, _REMEDY))
    if loader.num_workers > 1 and not getattr(loader, "in_order", True):
        raise UnsupportedStrategyError(expected(name, "a DataLoader with in_order=True", "in_order=False", _REMEDY))


class _RecordingSampler:
    """Yields what the loader's own sampler yields, and notes it in a queue that belongs to one iterator."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.queue: deque[list[Any]] = deque()

    def __iter__(self) -> Iterator[Any]:
        # Some samplers draw their permutation in `__iter__`, so it is called now and not at the first `next`: the
        # order in which random numbers are drawn must stay the same.
        self.queue = deque()
        return self._noting(iter(self.inner), self.queue)

    @staticmethod
    def _noting(items: Iterable[Any], queue: deque[list[Any]]) -> Iterator[Any]:
        for item in items:
            queue.append(list(item) if isinstance(item, list | tuple) else [item])
            yield item

    def __len__(self) -> int:
        return len(self.inner)


class _Deliveries:
    """The loader's iterator; a list of indices is moved on when its batch is handed over, not when it is prefetched."""

    def __init__(self, iterator: Any, queue: deque[list[Any]], delivered: deque[list[Any]]) -> None:
        self.iterator, self.queue, self.delivered = iterator, queue, delivered

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self.iterator)
        self.delivered.append(self.queue.popleft())
        return batch

    def __len__(self) -> int:
        return len(self.iterator)

    def __getattr__(self, name: str) -> Any:
        if name == "iterator":  # not there yet: unpickling or copying
            raise AttributeError(name)
        return getattr(self.iterator, name)


class IndexTap:
    """Listens to one loader.

    Attributes:
        loader: The user's loader, untouched.
        view: What the Trainer iterates instead: same data, same order, same random numbers.

    >>> tap = IndexTap(DataLoader(range(5), batch_size=2))
    >>> [(batch.tolist(), tap.take()) for batch in tap.view]
    [([0, 1], [0, 1]), ([2, 3], [2, 3]), ([4], [4])]
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        check_tappable(loader)
        self.loader = loader
        sampler = _RecordingSampler(loader._index_sampler)
        delivered = self._delivered = deque[list[Any]]()
        # Two views, so that the inner one binds workers that are already there to the recording sampler.
        listening = loader_view(loader, {"_index_sampler": property(lambda view: sampler)})

        def iterate(view: Any) -> Iterator[Any]:
            return _Deliveries(iter(listening), sampler.queue, delivered)

        self.view = loader_view(listening, {"__iter__": iterate, "_index_tap": self})

    @staticmethod
    def of(loader: Any) -> IndexTap | None:
        """The tap behind a view, `None` for any other object."""
        tap = getattr(type(loader), "_index_tap", None)
        return tap if isinstance(tap, IndexTap) else None

    def take(self, ahead: int = 0) -> list[Any]:
        """Indices behind the current batch; empty where this loader had none left.

        Args:
            ahead: Number of batches that were fetched after the current one and are waiting.
        """
        while len(self._delivered) > 1 + ahead:  # batches that were skipped because they collated to None
            self._delivered.popleft()
        return self._delivered.popleft() if self._delivered else []

    def clear(self) -> None:
        """Forget batches that were fetched and never used."""
        self._delivered.clear()

    def close(self) -> None:
        """Forget everything, and leave workers that outlive the fit with the loader's own sampler."""
        self.clear()
        release_workers(self.loader)
