"""A loader whose random numbers depend on what is drawn and when, and not on what was drawn before.

Every index knows its place (`data/seeded_order.py`) and takes that along, into workers as well, so the dataset and
`collate_fn` can be seeded where they run: nothing has to be told to workers that prefetch, or that outlive an epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, get_worker_info

from lightning_unlearn.data.index_tap import Deliveries
from lightning_unlearn.data.loader_view import loader_view
from lightning_unlearn.data.seeded_order import DrawnIndex, Place, place_of
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.rng import capture_rng, seed_generators, seeded_generators

__all__ = ["LoaderCopies", "SeededItems", "seeded_view"]


class _Fetched(NamedTuple):
    """Samples on the way from the dataset to `collate_fn`."""

    content: Any
    place: Place


class SeededItems:
    """A dataset whose samples are drawn under seeds of their own: of the epoch, the position and the occurrence.

    The samples of a dataset with `__getitems__` are asked for one by one: what is drawn for one must not depend on the
    others in its batch. Only a dataset that is indexed with lists itself is seeded by the batch. What is drawn for a
    sample on another device than the CPU is not seeded.

    Attributes:
        users: The user's dataset.

    Args:
        users: The user's dataset.
        seed: Seed.
    """

    def __init__(self, users: Any, seed: int) -> None:
        self.users, self._seed = users, seed

    def __len__(self) -> int:
        return len(self.users)

    def __getitems__(self, indices: Sequence[DrawnIndex]) -> _Fetched:
        fetch = getattr(self.users, "__getitems__", None)
        state = capture_rng()
        try:
            samples: list[Any] = []
            for index in indices:
                self._seed_item(index)
                samples += fetch([index.own]) if fetch else [self.users[index.own]]
        finally:
            state.restore()
        return _Fetched(samples, place_of(indices))

    def __getitem__(self, item: Any) -> _Fetched:
        place, state = place_of(item), capture_rng()
        try:
            if isinstance(item, DrawnIndex):
                self._seed_item(item)
                return _Fetched(self.users[item.own], place)
            seed_generators(self._seed, "list", place.epoch, place.ordinal)
            return _Fetched(self.users[[index.own for index in item]], place)
        finally:
            state.restore()

    def _seed_item(self, index: DrawnIndex) -> None:
        seed_generators(self._seed, "sample", index.place.epoch, int(index), index.occurrence, devices=False)


class _SeededCollate:
    """The user's `collate_fn`, seeded by the batch."""

    def __init__(self, users: Callable[[Any], Any], seed: int) -> None:
        self._users, self._seed = users, seed

    def __call__(self, fetched: _Fetched) -> Any:
        with seeded_generators(self._seed, "collate", fetched.place.epoch, fetched.place.ordinal):
            return self._users(fetched.content)


class _WorkerInit:
    """The user's `worker_init_fn`, which finds the user's dataset in the worker."""

    def __init__(self, users: Callable[[int], Any] | None) -> None:
        self._users = users

    def __call__(self, worker_id: int) -> None:
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, SeededItems):
            object.__setattr__(info, "dataset", info.dataset.users)  # it refuses to be changed in the ordinary way
        if self._users is not None:
            self._users(worker_id)


class LoaderCopies:
    """Copies of what loaders draw their order from, so that the user's own is never advanced.

    What several loaders of one fit share, such as a generator, their copies share as well.
    """

    def __init__(self) -> None:
        self._memo: dict[int, Any] = {}

    def __call__(self, loader: DataLoader[Any]) -> dict[str, Any]:
        """The sampler, batch sampler and generator of `loader`, copied; the data behind them are not.

        Raises:
            UnsupportedStrategyError: one of them cannot be copied.
        """
        samplers = loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)
        for one in (loader.dataset, *(getattr(sampler, "data_source", None) for sampler in samplers)):
            if one is not None:
                self._memo[id(one)] = one  # `deepcopy` takes what is here for the copy
        names = ("sampler", "batch_sampler", "generator")
        try:
            return {name: copy.deepcopy(getattr(loader, name), self._memo) for name in names}
        except (TypeError, RuntimeError, ValueError, copy.Error) as error:
            rule, remedy = "a loader whose sampler can be copied", "Give the sampler a `__deepcopy__`."
            raise UnsupportedStrategyError(expected("train_dataloader", rule, str(error), remedy)) from error


def seeded_view(
    loader: DataLoader[Any],
    sampler: Any,
    seed: int,
    copies: dict[str, Any],
    delivered: Callable[[int], None],
) -> DataLoader[Any]:
    """A view of `loader` whose samples and batches are drawn under seeds of their own.

    It has workers of its own, also where the loader's are persistent.

    Args:
        loader: The loader; it is not changed.
        sampler: A `SeededOrder`, or what thins one: takes the place of the loader's sampler or batch sampler.
        seed: Seed.
        copies: What stands in for attributes of the loader, see `LoaderCopies`.
        delivered: Called with the number of each batch, from 0 in every iterator, as it is handed over.
    """
    users: Any = type(loader)
    workers: dict[str, Any] = {"iterator": None}

    def get_iterator(view: Any) -> Any:
        # Only those who fetch see other data: anybody else asks the loader for the user's dataset.
        attributes = {
            "dataset": SeededItems(view.dataset, seed),
            "collate_fn": _SeededCollate(view.collate_fn, seed),
            "worker_init_fn": _WorkerInit(view.worker_init_fn),
        }
        return users._get_iterator(loader_view(view, {name: _constant(value) for name, value in attributes.items()}))

    inner: Any = loader_view(
        loader,
        {
            "_index_sampler": _constant(sampler),
            "_iterator": property(lambda view: workers["iterator"], lambda view, value: workers.update(iterator=value)),
            "_get_iterator": get_iterator,
            **{name: _constant(value) for name, value in copies.items()},
        },
    )

    def iterate(view: Any) -> Iterator[Any]:
        numbers = iter(range(2**63))
        return Deliveries(type(inner).__iter__(view), lambda batch: delivered(next(numbers)))

    return loader_view(inner, {"__iter__": iterate})


def _constant(value: Any) -> property:
    return property(lambda view: value)
