"""The user's data cut down to some samples, for an ordinary training whose order comes from a seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_unlearn.data.splits import CARRIED_SETTINGS, Positions, check_splittable
from lightning_unlearn.data.users_hooks import UsersHook, owned
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.facade import check_shareable, facade_class, on_same_state

__all__ = ["SelectedDataModule", "check_selectable", "drawn_positions", "selected_loader"]

_SAMPLERS = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


def _sampling(loader: DataLoader[Any]) -> tuple[Any, int | None, bool]:
    """Sampler, batch size (`None` without batching) and `drop_last`, wherever they were given."""
    policy: Any = loader.batch_sampler
    if policy is None:
        return loader.sampler, None, False
    if type(policy) is not BatchSampler:
        return policy, None, False
    return policy.sampler, policy.batch_size, policy.drop_last


def check_selectable(loader: Any) -> DataLoader[Any]:
    """Return a loader whose drawing can be repeated for a part of its data from a seed.

    Raises:
        UnsupportedStrategyError: not one `DataLoader` of a map-style dataset; or its sampler is not one of torch's
            (random, in order, of a subset, weighted): another one's state cannot be known, nor can it be seeded.
    """
    sampler = _sampling(check_splittable(loader))[0]
    if type(sampler) not in _SAMPLERS:
        rule = "a loader that shuffles, or goes in order, by torch's own samplers, which can be seeded"
        remedy = "Pass shuffle=True or False instead of a sampler."
        raise UnsupportedStrategyError(expected("data", rule, type(sampler).__name__, remedy))
    return loader  # type: ignore[no-any-return]


def drawn_positions(loader: DataLoader[Any]) -> Positions:
    """Ascending positions of the dataset that the loader draws from: all, or those of its `SubsetRandomSampler`.

    >>> drawn_positions(DataLoader(range(5), sampler=SubsetRandomSampler([4, 1])))
    array([1, 4])
    """
    sampler = _sampling(loader)[0]
    if isinstance(sampler, SubsetRandomSampler):
        return np.unique(np.asarray(list(sampler.indices), dtype=np.int64))
    return np.arange(len(loader.dataset), dtype=np.int64)  # type: ignore[arg-type]


class _WholeBatches(Sampler[list[int]]):
    """Batches of `size` in which every drawn sample is used, where the user does not drop the last ones.

    A last batch of one sample joins the one before it: normalisation layers cannot be trained on a single one.
    """

    def __init__(self, sampler: Sampler[int], size: int, drop_last: bool) -> None:
        self.sampler = sampler
        self.batch_size = size
        # Where all would be dropped there would be no step, and no way to forget what made the part so small.
        self.drop_last = drop_last and len(sampler) >= size  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        drawn = list(self.sampler)
        batches = [drawn[start : start + self.batch_size] for start in range(0, len(drawn), self.batch_size)]
        if self.drop_last and len(batches[-1]) < self.batch_size:
            batches.pop()
        elif self.batch_size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
            single = batches.pop()
            batches[-1] += single
        yield from batches  # drawn with the first batch, as torch's own does: the same seed gives the same order

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.batch_size)  # type: ignore[arg-type]
        joins = self.drop_last or (rest == 1 and whole > 0 and self.batch_size > 1)
        return whole + int(rest > 0 and not joins)


def selected_loader(loader: DataLoader[Any], positions: Iterable[int], seed: int) -> DataLoader[Any]:
    """A training loader over some positions of another one's dataset, otherwise like it, seeded.

    What is drawn depends on the samples and the seed only. Draws with replacement and weighted ones are as many as is
    the part's share of the user's. `drop_last` counts where it leaves something.

    >>> data = DataLoader(range(7), batch_size=2)
    >>> [batch.tolist() for batch in selected_loader(data, [0, 2, 4, 5, 6], seed=0)]
    [[0, 2], [4, 5, 6]]
    """
    sampler, size, drop_last = _sampling(check_selectable(loader))
    chosen = sorted({int(position) for position in positions})
    subset: Subset[Any] = Subset(loader.dataset, chosen)
    generator = torch.Generator().manual_seed(seed)
    settings = {name: getattr(loader, name) for name in CARRIED_SETTINGS if hasattr(loader, name)}
    settings["generator"] = generator
    part = _part_sampler(sampler, subset, chosen, generator)
    if size is None:
        return DataLoader(subset, batch_size=None, sampler=part, **settings)
    return DataLoader(subset, batch_sampler=_WholeBatches(part, size, drop_last), **settings)


def _part_sampler(own: Any, subset: Subset[Any], chosen: Sequence[int], generator: torch.Generator) -> Sampler[int]:
    if isinstance(own, SequentialSampler):
        return SequentialSampler(subset)
    if isinstance(own, WeightedRandomSampler):
        draws = max(1, math.floor(own.num_samples * len(chosen) / len(own.weights)))
        weights = own.weights[torch.as_tensor(chosen)].tolist()
        return WeightedRandomSampler(weights, draws, own.replacement, generator)
    if isinstance(own, RandomSampler) and own.num_samples != len(own.data_source):
        draws = max(1, math.floor(own.num_samples * len(chosen) / len(own.data_source)))
        return RandomSampler(subset, own.replacement, draws, generator)
    return RandomSampler(subset, bool(getattr(own, "replacement", False)), generator=generator)


class SelectedDataModule(LightningDataModule):
    """A user's datamodule whose training data are some positions of a loader it gave; the rest is the user's.

    A second object on the user's state (`utilities/facade.py`). It was set up before: the Trainer's calls of
    `prepare_data`, `setup` and `teardown` do nothing, so that the data are the same in every training.

    Args:
        users: The user's datamodule, set up.
        loader: The training loader it gave.
        positions: Positions in the loader's dataset.
        seed: Of the order.
    """

    __slots__ = ("_chosen", "_users")

    _users: LightningDataModule
    _chosen: tuple[DataLoader[Any], tuple[int, ...], int]
    _facade_of: ClassVar[type[SelectedDataModule]]

    val_dataloader: Any = UsersHook()
    test_dataloader: Any = UsersHook()
    predict_dataloader: Any = UsersHook()
    state_dict: Any = UsersHook()
    load_state_dict: Any = UsersHook()
    on_exception: Any = UsersHook()
    on_before_batch_transfer: Any = UsersHook()
    transfer_batch_to_device: Any = UsersHook()
    on_after_batch_transfer: Any = UsersHook()

    def __new__(cls, users: LightningDataModule, *args: Any, **kwargs: Any) -> Self:
        """An object of the class `(cls, class of the user's datamodule)` on the user's state."""
        check_shareable(type(users), "data")
        instance: Self = on_same_state(facade_class(cls, type(users)), users.__dict__)
        return instance

    def __init__(
        self, users: LightningDataModule, loader: DataLoader[Any], positions: Iterable[int], seed: int
    ) -> None:
        # No `super().__init__()`: the state is the user's and already initialised.
        self._users = users
        self._chosen = loader, tuple(positions), seed

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was built on the fly and has no importable name; the user's object pickles by its own rules.
        return self._facade_of, (self._users, *self._chosen)

    @owned
    def train_dataloader(self) -> DataLoader[Any]:
        """The seeded loader of the selected samples, a new one each time; reloaded ones go on to another order."""
        loader, positions, seed = self._chosen
        epoch = 0 if self._users.trainer is None else self._users.trainer.current_epoch
        return selected_loader(loader, positions, seed + epoch)

    @owned
    def prepare_data(self) -> None:
        """Nothing: it was done."""

    @owned
    def setup(self, stage: str | None = None) -> None:
        """Nothing: it was done."""

    @owned
    def teardown(self, stage: str | None = None) -> None:
        """Nothing: the data are needed again."""
