"""Data whose test part cannot be read: for everything that chooses, so that what is reported later was never seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import numpy as np
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from lightning_unlearn.data.plain_loaders import datamodule_of_loaders
from lightning_unlearn.data.positions import RootIndex
from lightning_unlearn.exceptions import SealedDataError, UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.facade import check_shareable, facade_class, on_same_state

__all__ = ["check_disjoint", "without_test_data"]


class _Sealed:
    """A hook that refuses, whatever the user's class or object has under that name: a data descriptor."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any | None, owner: type) -> Any:
        if instance is None:
            return getattr(LightningDataModule, self.name)

        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            rule, remedy = "left alone while hyper-parameters are chosen", "Evaluate the chosen settings afterwards."
            raise SealedDataError(expected(self.name, rule, "a call", remedy))

        return refuse

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = value  # as on the user's own object: the dict is theirs


class _WithoutTestData(LightningDataModule):
    """The user's datamodule with sealed hooks."""

    __slots__ = ()

    _facade_of: ClassVar[type[_WithoutTestData]]
    test_dataloader: Any = _Sealed()
    predict_dataloader: Any = _Sealed()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was built on the fly and has no importable name; the user's object pickles by its own rules.
        users_class = type(self).__mro__[2]
        return without_test_data, (on_same_state(users_class, {**self.__dict__, "trainer": None}),)


def without_test_data(
    data: LightningDataModule | DataLoader[Any] | Mapping[str, DataLoader[Any]],
) -> LightningDataModule:
    """The same data, of which nobody gets test or prediction data: asking for them raises.

    It is another object of the user's class, with the same attributes and without a Trainer; what is set on it is not
    set on the user's. A loader of test data in a mapping is left out. Whoever holds the dataset itself, in an
    attribute, can read it: what is sealed are the hooks that Trainers and this package use.

    Args:
        data: A datamodule, a training loader, or a mapping of loaders.

    Raises:
        UnsupportedStrategyError: as for `UnlearningDataModule`.

    >>> sealed = without_test_data({"train": DataLoader(range(4)), "test": DataLoader(range(2))})
    >>> sealed.test_dataloader()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    lightning_unlearn.exceptions.SealedDataError: Expected `test_dataloader` to be left alone while ...
    """
    if isinstance(data, Mapping):
        data = {name: loader for name, loader in data.items() if name != "test"}
    users = data if isinstance(data, LightningDataModule) else datamodule_of_loaders(data)
    check_shareable(type(users), "data")
    state = {**users.__dict__, "trainer": None}
    sealed: LightningDataModule = on_same_state(facade_class(_WithoutTestData, type(users)), state)
    return sealed


def check_disjoint(loaders: Mapping[str, DataLoader[Any] | None]) -> None:
    """Refuse parts of the data that share samples, as far as their datasets tell; no sample is read.

    Subsets and concatenations are looked through. Copies of the same samples in another dataset are not recognised.

    Args:
        loaders: Name of the part -> loader; `None` where there is none.

    Raises:
        ValueError: two parts hold the same sample of the same dataset.

    >>> data = list(range(5))
    >>> check_disjoint({"val": DataLoader(data), "test": DataLoader(data)})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: Expected `data` to be in parts that share no samples, but got ...
    """
    roots = RootIndex()
    found: dict[str, NDArray[np.int64]] = {}
    for name, loader in loaders.items():
        if loader is None:
            continue
        try:
            positions = roots.positions(loader.dataset)
        except UnsupportedStrategyError:  # a dataset without a length has no positions to compare
            continue
        found[name] = np.arange(len(loader.dataset)) if positions is None else positions  # type: ignore[arg-type]
        for other, theirs in found.items():
            shared = 0 if other == name else len(np.intersect1d(found[name], theirs))
            if shared:
                rule, got = "in parts that share no samples", f"{shared} samples in both {other} and {name}"
                remedy = "What is chosen on samples that were trained on, or are reported on later, proves nothing."
                raise ValueError(expected("data", rule, got, remedy))
