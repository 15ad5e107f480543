"""Plain loaders as a datamodule, so that everything else deals with datamodules only."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from lightning_unlearn.data.splits import check_splittable
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import check_choice, expected

__all__ = ["datamodule_of_loaders"]

_LOADER_KEYS = ("train", "val", "test")


def _give(loader: DataLoader[Any]) -> DataLoader[Any]:
    return loader


def datamodule_of_loaders(data: Any) -> LightningDataModule:
    """A datamodule around plain loaders, built as `LightningDataModule.from_datasets` builds its own.

    Raises:
        UnsupportedStrategyError: no training loader, or one that cannot be split.
    """
    loaders = dict(data) if isinstance(data, Mapping) else {"train": data}
    for name in loaders:
        check_choice("data", name, _LOADER_KEYS)
    if "train" not in loaders:
        raise UnsupportedStrategyError(expected("data", "loaders with the key 'train'", list(loaders)))
    check_splittable(loaders["train"])
    users = LightningDataModule()
    for name, loader in loaders.items():
        # A partial of a module-level function pickles; only loaders that exist make their hook "overridden".
        setattr(users, f"{name}_dataloader", functools.partial(_give, loader))
    return users
