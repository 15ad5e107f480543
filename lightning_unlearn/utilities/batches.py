"""How many samples a batch of unknown shape holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["leading_size"]


def _sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch.shape[0]
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _sizes(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _sizes(value)
    elif dataclasses.is_dataclass(batch):
        for item in dataclasses.fields(batch):
            yield from _sizes(getattr(batch, item.name))


def leading_size(batch: Any) -> int | None:
    """First dimension of the first tensor in a batch that has one, `None` where there is none.

    The order is Lightning's when it guesses a batch size. Strings are passed over: their length is no batch size.

    >>> import torch
    >>> leading_size({"id": "a", "x": torch.zeros(4, 2)}), leading_size("text")
    (4, None)
    """
    return next(_sizes(batch), None)
