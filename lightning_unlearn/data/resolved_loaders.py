"""How the indices that a set of loaders delivers become ids."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_unlearn.data.index_tap import IndexTap
from lightning_unlearn.data.positions import RootIndex, SampleKeys, as_sample_id, resolve_keys
from lightning_unlearn.exceptions import DeletionRequestError, UnsupportedStrategyError
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import expected

__all__ = ["ResolvedLoaders"]


class ResolvedLoaders:
    """The taps of one set of loaders, and how their indices become ids.

    Args:
        combined: The Trainer's `CombinedLoader`.
        sample_keys: Position -> key, or `None` where positions are the ids.

    Attributes:
        source: `combined`.
        taps: The taps, in the order of the loaders.
        length: Number of samples of the underlying data, `None` where it has no length.
        keys: Key of every position, `None` where there are none or they come from a function.

    Raises:
        UnsupportedStrategyError: a loader was set up before anybody listened.
        DeletionRequestError: the keys do not fit the data.
    """

    def __init__(self, combined: Any, sample_keys: SampleKeys | None) -> None:
        self.source = combined
        self.taps = [tap for tap in map(IndexTap.of, combined.flattened) if tap is not None]
        if len(self.taps) < len(combined.flattened):
            # Built before anybody listened: whoever trains on them is unknown, and silence would look like consent.
            rule = "set up while the recorder listens, that is after its `setup`"
            raise UnsupportedStrategyError(expected("train_dataloader", rule, "loaders that were set up before"))
        roots = RootIndex()
        self._positions: list[NDArray[np.int64] | None] = [roots.positions(tap.loader.dataset) for tap in self.taps]
        self.length = roots.length
        self._function = sample_keys if callable(sample_keys) and self.length is None else None
        self.keys: list[SampleId] | None = None
        if sample_keys is not None and self._function is None:
            if self.length is None:
                rule = "a function of the position where the dataset has no length"
                raise DeletionRequestError(expected("sample_keys", rule, type(sample_keys).__name__))
            self.keys = resolve_keys(sample_keys, self.length)

    def name(self, tap: IndexTap, indices: Sequence[Any]) -> list[SampleId]:
        """Ids of the samples that a loader has drawn by these indices."""
        positions = self._positions[self.taps.index(tap)]
        found = [as_sample_id("index", index) for index in indices]
        dataset = tap.loader.dataset
        if isinstance(dataset, Sized):  # what is below zero counts from the end
            found = [index + len(dataset) if isinstance(index, int) and index < 0 else index for index in found]
        if positions is not None:
            found = positions[np.asarray(found, dtype=np.int64)].tolist()
        if self._function is not None:
            return [as_sample_id("sample_keys", self._function(int(index))) for index in found]
        return found if self.keys is None else [self.keys[int(index)] for index in found]
