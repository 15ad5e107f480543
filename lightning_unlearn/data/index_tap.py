"""Which indices are behind the batch that a loader has just delivered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_unlearn.data.loader_view import loader_view, release_workers
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected

__all__ = ["BatchTap", "Deliveries", "IndexTap", "check_tappable"]

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
        iterator = iter(self.inner)
        return (_StatefulNotes if _has_state(iterator) else _Notes)(iterator, self.queue)

    def __len__(self) -> int:
        return len(self.inner)


class _Notes:
    """An iterator over lists of indices that notes each one."""

    def __init__(self, inner: Iterator[Any], queue: deque[list[Any]]) -> None:
        self.inner, self.queue = inner, queue

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = next(self.inner)
        self.queue.append(list(item) if isinstance(item, list | tuple) else [item])
        return item


class _Stateful:
    """Passes the state of what is inside through: a stateful loader looks for it, and resumes in the wrong place else.

    A class of its own, because what has no state must not have these methods either.
    """

    inner: Any

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)


class _StatefulNotes(_Stateful, _Notes):
    pass


class _StatefulRecordingSampler(_Stateful, _RecordingSampler):
    pass


def _has_state(sampler: Any) -> bool:
    return hasattr(sampler, "state_dict") and hasattr(sampler, "load_state_dict")


class Deliveries:
    """The loader's iterator; `heard` is called as a batch is handed over, not when it is prefetched.

    Args:
        iterator: The iterator, whose attributes are those of this one as well.
        heard: Called with each batch.
    """

    def __init__(self, iterator: Any, heard: Callable[[Any], None]) -> None:
        self.iterator, self.heard = iterator, heard

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self.iterator)
        self.heard(batch)
        return batch

    def __len__(self) -> int:
        return len(self.iterator)

    def __getattr__(self, name: str) -> Any:
        if name == "iterator":  # not there yet: unpickling or copying
            raise AttributeError(name)
        return getattr(self.iterator, name)


def _prefetched(iterator: Any) -> int | None:
    """Number of index lists that workers have and whose batches were not delivered; `None` where nobody can tell."""
    sent, received = getattr(iterator, "_send_idx", None), getattr(iterator, "_rcvd_idx", None)
    if sent is not None and received is not None:
        return int(sent - received)
    return 0 if isinstance(iterator, _BaseDataLoaderIter) else None


def _take_next(queue: deque[list[Any]], iterator: Any) -> list[Any]:
    """Out of the queue the indices of the batch that `iterator` has just delivered."""
    waiting = _prefetched(iterator)
    # A stateful loader that goes on in mid-epoch may draw again what was trained on before, and leave it aside.
    while waiting is not None and len(queue) > waiting + 1:
        queue.popleft()
    if not queue:
        rule = "one whose batches are drawn from its sampler while the recorder listens"
        got = "a batch of an iterator that was there before"
        raise UnsupportedStrategyError(expected("train_dataloader", rule, got, "Give the Trainer a fresh loader."))
    return queue.popleft()


class IndexTap:
    """Listens to one loader.

    Attributes:
        loader: The user's loader, untouched.
        view: What the Trainer iterates instead: same data, same order, same random numbers.
        count: Number of batches it has delivered.

    >>> tap = IndexTap(DataLoader(range(5), batch_size=2))
    >>> [(batch.tolist(), tap.take()) for batch in tap.view]
    [([0, 1], [0, 1]), ([2, 3], [2, 3]), ([4], [4])]
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        check_tappable(loader)
        self.loader = loader
        self.count = 0
        inner = loader._index_sampler
        sampler = (_StatefulRecordingSampler if _has_state(inner) else _RecordingSampler)(inner)
        delivered = self._delivered = deque[list[Any]]()
        # Two views, so that the inner one binds workers that are already there to the recording sampler.
        listening = loader_view(loader, {"_index_sampler": property(lambda view: sampler)})

        def iterate(view: Any) -> Iterator[Any]:
            iterator = iter(listening)
            queue = sampler.queue

            def heard(batch: Any) -> None:
                indices = _take_next(queue, iterator)
                if batch is not None:  # `collate_fn` left it out, so nobody trains on it
                    self.count += 1
                    delivered.append(indices)

            return Deliveries(iterator, heard)

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
        while len(self._delivered) > 1 + ahead:  # a hook made nothing of a batch, so it was skipped
            self._delivered.popleft()
        return self._delivered.popleft() if self._delivered else []

    def take_all(self) -> list[Any]:
        """Indices behind everything that was delivered since the last call."""
        indices = [index for delivered in self._delivered for index in delivered]
        self._delivered.clear()
        return indices

    def clear(self) -> None:
        """Forget batches that were fetched and never used."""
        self._delivered.clear()

    def close(self) -> None:
        """Forget everything, and leave workers that outlive the fit with the loader's own sampler."""
        self.clear()
        iterator: Any = getattr(self.loader, "_iterator", None)
        notes = getattr(iterator, "_sampler_iter", None)
        if isinstance(notes, _Notes):  # a stateful loader keeps its last iterator, and asks it for its state
            iterator._sampler_iter = notes.inner
        release_workers(self.loader)


class BatchTap:
    """Listens to one loader whose batches say themselves who is in them.

    Attributes:
        loader: The user's loader, untouched.
        view: What the Trainer iterates instead.
        count: Number of batches it has delivered.

    >>> tap = BatchTap(DataLoader(range(3), batch_size=2), lambda batch: batch.tolist())
    >>> _ = list(tap.view); tap.take_all(), tap.count
    ([0, 1, 2], 2)

    Args:
        loader: The loader, of any kind of data.
        ids_of: The ids in a batch.

    Raises:
        UnsupportedStrategyError: not a `DataLoader`.
    """

    def __init__(self, loader: Any, ids_of: Callable[[Any], Sequence[Any]]) -> None:
        if not isinstance(loader, DataLoader):
            remedy = "Put it into a `DataLoader(..., batch_size=None)`."
            raise UnsupportedStrategyError(expected("train_dataloader", "a DataLoader", type(loader).__name__, remedy))
        self.loader = loader
        self.count = 0
        self._ids: list[Any] = []
        iterate_loader = loader_view(loader, {})

        def heard(batch: Any) -> None:
            if batch is not None:
                self.count += 1
                self._ids.extend(ids_of(batch))

        self.view = loader_view(loader, {"__iter__": lambda view: Deliveries(iter(iterate_loader), heard)})

    def take_all(self) -> list[Any]:
        """Ids in everything that was delivered since the last call."""
        ids, self._ids = self._ids, []
        return ids
