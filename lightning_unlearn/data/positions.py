"""From a position in a wrapped dataset to the position, or key, of the underlying sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from lightning_unlearn.exceptions import DeletionRequestError, UnsupportedStrategyError
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import expected

__all__ = ["RootIndex", "SampleKeys", "as_sample_id", "resolve_keys", "root_length", "root_positions"]

SampleKeys: TypeAlias = Sequence[SampleId] | Mapping[int, SampleId] | Callable[[int], SampleId]
"""Position of a sample -> its stable key, such as a user id; several samples may have the same key."""


def as_sample_id(name: str, value: Any) -> SampleId:
    """An int or str from an int, str, or anything that holds a single one (NumPy scalar, tensor of one element).

    Raises:
        DeletionRequestError: neither; bools and floats are refused, too.

    >>> as_sample_id("id", np.int64(3)), as_sample_id("id", "user-1")
    (3, 'user-1')
    """
    single = value.numel() if isinstance(value, Tensor) else getattr(value, "size", 0)
    if isinstance(value, Tensor | np.generic | np.ndarray) and single == 1:
        value = value.item()
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise DeletionRequestError(expected(name, "an int or a str", value))
    return int(value)


def resolve_keys(sample_keys: SampleKeys, n: int) -> list[SampleId]:
    """The key of each of `n` samples.

    Args:
        sample_keys: A sequence of length `n`, a mapping that has every position, or a function of the position.
        n: Number of samples of the underlying dataset.

    Raises:
        DeletionRequestError: wrong length, a position without a key, or a key that is neither int nor str.

    >>> resolve_keys(["a", "b", "a"], 3), resolve_keys(lambda position: f"user-{position // 2}", 3)
    (['a', 'b', 'a'], ['user-0', 'user-0', 'user-1'])
    """
    if isinstance(sample_keys, Mapping):
        missing = next((position for position in range(n) if position not in sample_keys), None)
        if missing is not None:
            rule = f"a mapping that has every position below {n}"
            raise DeletionRequestError(expected("sample_keys", rule, f"none for position {missing}"))
        return [as_sample_id("sample_keys", sample_keys[position]) for position in range(n)]
    if callable(sample_keys):
        return [as_sample_id("sample_keys", sample_keys(position)) for position in range(n)]
    if len(sample_keys) != n:
        rule = f"one key for each of the {n} samples"
        remedy = "Keys belong to the underlying dataset, not to a subset of it."
        raise DeletionRequestError(expected("sample_keys", rule, f"{len(sample_keys)} keys", remedy))
    return [as_sample_id("sample_keys", key) for key in sample_keys]


class RootIndex:
    """The underlying datasets of several wrapped ones, and positions in all of them together.

    `Subset` (also of `random_split`) and `ConcatDataset` are looked through, however nested. Different underlying
    datasets are numbered one after the other, in the order in which they are met; one that is met again keeps its
    numbers, so the two parts of a split agree.

    >>> roots = RootIndex()
    >>> data = [10, 20, 30, 40]
    >>> roots.positions(Subset(data, [3, 1])).tolist(), roots.positions(data), roots.length
    ([3, 1], None, 4)
    """

    def __init__(self) -> None:
        self._roots: list[tuple[Any, int]] = []

    @property
    def length(self) -> int | None:
        """Number of samples of all underlying datasets together, `None` where one has no length."""
        lengths = [len(root) if isinstance(root, Sized) else None for root, _ in self._roots]
        known = [length for length in lengths if length is not None]
        return sum(known) if len(known) == len(lengths) else None

    def positions(self, dataset: Any) -> NDArray[np.int64] | None:
        """For each position of `dataset` that of the underlying sample; `None` where they are the same.

        Raises:
            UnsupportedStrategyError: a dataset without a length among several.
        """
        if isinstance(dataset, Subset):
            inner = self.positions(dataset.dataset)
            indices = np.asarray(dataset.indices, dtype=np.int64).reshape(-1)
            if (indices < 0).any():
                indices = np.where(indices < 0, indices + len(dataset.dataset), indices)  # type: ignore[arg-type]
            return indices if inner is None else inner[indices]
        if isinstance(dataset, ConcatDataset):
            return np.concatenate([self._explicit(part) for part in dataset.datasets])
        offset = self._offset(dataset)
        return None if offset == 0 else np.arange(offset, offset + len(dataset), dtype=np.int64)

    def _explicit(self, dataset: Any) -> NDArray[np.int64]:
        positions = self.positions(dataset)
        return np.arange(len(dataset), dtype=np.int64) if positions is None else positions

    def _offset(self, root: Any) -> int:
        for known, offset in self._roots:
            if known is root:
                return offset
        length = self.length
        if length is None or (self._roots and not isinstance(root, Sized)):
            remedy = "Pass `sample_id=` to name the samples by the batches themselves."
            raise UnsupportedStrategyError(
                expected("dataset", "a dataset with a length, as it is one of several", type(root).__name__, remedy)
            )
        self._roots.append((root, length))
        return length


def root_positions(dataset: Any) -> NDArray[np.int64] | None:
    """For each position of `dataset` the position of the underlying sample, looking through subsets and concatenations.

    This is the position that recorded sample ids mean.

    Returns:
        int64 of shape (len(dataset),), or `None` where `dataset` is itself the underlying one.

    >>> data = list("abcdef")
    >>> root_positions(Subset(Subset(data, [5, 3, 1]), [2, 0])).tolist()
    [1, 5]
    >>> root_positions(data) is None
    True
    """
    return RootIndex().positions(dataset)


def root_length(dataset: Any) -> int:
    """Number of samples of what is underneath `dataset`: every position `root_positions` can give is below it.

    Raises:
        UnsupportedStrategyError: the underlying dataset has no length.

    >>> root_length(Subset(list("abcdef"), [5, 3]))
    6
    """
    roots = RootIndex()
    roots.positions(dataset)
    if roots.length is None:
        raise UnsupportedStrategyError(expected("dataset", "a dataset with a length", type(dataset).__name__))
    return roots.length
