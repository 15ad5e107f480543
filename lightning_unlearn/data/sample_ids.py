"""Who is in this batch: sample ids, captured without touching the user's module, dataset or loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args
from warnings import warn

import numpy as np
from lightning import Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from numpy.typing import NDArray
from torch import Tensor

from lightning_unlearn.data.index_tap import IndexTap
from lightning_unlearn.data.loader_view import add_loader_step
from lightning_unlearn.data.positions import (
    RootIndex,
    SampleKeys,
    as_sample_id,
    resolve_keys,
    root_length,
    root_positions,
)
from lightning_unlearn.exceptions import (
    DeletionRequestError,
    MissingRequirementError,
    StoreMismatchError,
    UnlearningWarning,
    UnsupportedStrategyError,
)
from lightning_unlearn.types import DataFingerprint, Identity, Part, SampleId
from lightning_unlearn.utilities.checks import expected

__all__ = ["TAP_ORDER", "BatchIdentity", "SampleKeys", "resolve_keys", "root_length", "root_positions"]

TAP_ORDER = 100
"""Place of the tap among the loader steps: last, so that it hears the batches that are really used."""


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)


def _disagreeing_size(batch: Any, n: int) -> int | None:
    """The batch size, where all tensors agree on one that is not `n` and none has a dimension of size `n`."""
    shapes = [tensor.shape for tensor in _tensors(batch) if tensor.ndim]
    sizes = {shape[0] for shape in shapes}
    return sizes.pop() if len(sizes) == 1 and not any(n in shape for shape in shapes) else None


class BatchIdentity:
    """The ids of every training batch of one Trainer.

    By default an id is the position that the underlying dataset receives (`root_positions`), taken from the loader's
    own sampler as the batch is handed over: exact for any sampler, number of workers, strategy that splits the
    sampler, and combination of loaders, and no random number is drawn. Positions mean something only for that very
    dataset; `sample_keys` turns them into stable keys. Iterable data needs `sample_id`.

    Args:
        sample_id: Key (or attribute) of the batch that holds its ids, or a function of the batch that returns them.
        sample_keys: Position of a sample in the underlying dataset -> its key; see `resolve_keys`.
        digest: Hash of the data, if the user has one, for `fingerprint`.

    Raises:
        ValueError: both `sample_id` and `sample_keys` were given, or one is of the wrong type.
    """

    def __init__(
        self,
        sample_id: str | Callable[[Any], Sequence[SampleId]] | None = None,
        sample_keys: SampleKeys | None = None,
        *,
        digest: str | None = None,
    ) -> None:
        if sample_id is not None and not isinstance(sample_id, str) and not callable(sample_id):
            raise ValueError(expected("sample_id", "a key of the batch, a function of it, or None", sample_id))
        if sample_keys is not None and (isinstance(sample_keys, str) or not _is_keys(sample_keys)):
            raise ValueError(expected("sample_keys", "a sequence, a mapping, a function, or None", sample_keys))
        if sample_id is not None and sample_keys is not None:
            remedy = "Ids that come from the batch are keys already."
            raise ValueError(expected("sample_keys", "None where `sample_id` is given", "both", remedy))
        self._sample_id = sample_id
        self._sample_keys = sample_keys
        self._digest = digest
        self._trainer: Trainer | None = None
        self._remove: Callable[[], None] | None = None
        self._taps: list[IndexTap] = []
        self._resolved: _ResolvedLoaders | None = None
        self._warned = False

    @property
    def identity(self) -> Identity:
        """Where the ids come from."""
        if self._sample_id is not None:
            return "batch"
        return "position" if self._sample_keys is None else "key"

    @property
    def fingerprint(self) -> DataFingerprint:
        """What is known of the data; known once training starts, and later than `install` for positions and keys."""
        length = None if self.identity == "batch" else self._resolve().length
        return DataFingerprint(self.identity, length, self._digest)

    @property
    def known_ids(self) -> frozenset[SampleId] | range | None:
        """Every id that can occur, `None` where that cannot be told."""
        if self.identity == "batch":
            return None
        resolved = self._resolve()
        if resolved.keys is not None:
            return frozenset(resolved.keys)
        return None if resolved.length is None else range(resolved.length)

    def install(self, trainer: Trainer) -> None:
        """Start listening; to be called in `setup`, before the Trainer builds its loaders.

        Raises:
            UnsupportedStrategyError: `training_step` fetches its batches itself; and, later, as the Trainer sets up its
                loaders, one of them cannot be listened to. Nothing has been trained then.
        """
        self.uninstall()
        step = trainer.lightning_module.training_step
        if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
            got = "training_step(dataloader_iter)"
            remedy = "Take `batch` instead, so that the Trainer knows which batch is being trained on."
            raise UnsupportedStrategyError(expected("training_step", "a function of a batch", got, remedy))
        self._trainer = trainer
        if self._sample_id is None:
            self._remove = add_loader_step(trainer, self._tap, order=TAP_ORDER)

    def uninstall(self) -> None:
        """Stop listening and leave nothing behind; may be called at any time, any number of times."""
        if self._remove is not None:
            self._remove()
        for tap in self._taps:
            tap.close()
        self._trainer = self._remove = self._resolved = None
        self._taps = []

    def end_epoch(self) -> None:
        """Forget what was fetched beyond the last batch of the epoch; to be called in `on_train_epoch_end`."""
        for tap in self._taps:
            tap.clear()

    def batch_ids(self, batch: Any) -> list[SampleId]:
        """Ids of this rank's current batch, in order and with repeats; to be called once in `on_train_batch_start`.

        Raises:
            MissingRequirementError: nobody knows who is in the batch: `sample_id` finds no ids in it, or not one for
                each of its samples, or the loader delivered it unheard.
            DeletionRequestError: an id is neither an int nor a str.
        """
        if self._sample_id is not None:
            return [sample for piece in _parts_of(batch) for sample in self._ids_in(piece)]
        trainer = self._installed()
        # An iterable of unknown length makes the Trainer fetch one batch ahead, to know which one is the last.
        ahead = len(getattr(trainer.fit_loop._data_fetcher, "batches", ()))
        resolved = self._resolve()
        ids = [sample for tap in resolved.taps for sample in resolved.name(tap, tap.take(ahead))]
        if not ids:
            remedy = "Pass `sample_id=` (a key of the batch, or a function of it)."
            raise MissingRequirementError(expected("batch", "one whose indices were drawn by its loader", 0, remedy))
        self._compare_size(batch, len(ids), resolved)
        return ids

    def _installed(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError("BatchIdentity is not installed on a Trainer")
        return self._trainer

    def _tap(self, loader: Any) -> Any:
        tap = IndexTap(loader)
        self._taps.append(tap)
        return tap.view

    def _resolve(self) -> _ResolvedLoaders:
        combined = self._installed().fit_loop._combined_loader
        if self._resolved is None or self._resolved.source is not combined:
            before = self._resolved
            self._resolved = _ResolvedLoaders(combined, self._sample_keys)
            if before is not None and self.identity == "position" and before.length != self._resolved.length:
                remedy = "Positions of one dataset mean nothing in another: pass `sample_keys`."
                rule = f"the same dataset of {before.length} samples in every epoch"
                raise StoreMismatchError(expected("train_dataloader", rule, self._resolved.length, remedy))
            self._taps = [tap for tap in self._taps if tap in self._resolved.taps]
        return self._resolved

    def _compare_size(self, batch: Any, n: int, resolved: _ResolvedLoaders) -> None:
        batched = len(resolved.taps) == 1 and resolved.taps[0].loader.batch_sampler is not None
        if self._warned or not batched:
            return
        size = _disagreeing_size(batch, n)
        if size is not None:
            self._warned = True
            remedy = "Where the dataset or `collate_fn` drops or replaces samples, pass `sample_id=`."
            rule = f"as long as the {n} indices that were drawn for it"
            warn(expected("batch", rule, size, remedy), UnlearningWarning, stacklevel=3)

    def _ids_in(self, batch: Any) -> list[SampleId]:
        source = self._sample_id
        if isinstance(source, str):
            try:
                found = batch[source] if isinstance(batch, Mapping) else getattr(batch, source)
            except (KeyError, AttributeError):
                got = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
                remedy = "Name a key that the batch has, or pass a function of the batch."
                rule = "a key or attribute of every training batch"
                raise MissingRequirementError(
                    expected("sample_id", rule, source, f"The batch is {got!r}. {remedy}")
                ) from None
        else:
            found = source(batch) if source is not None else ()
        if isinstance(found, Tensor | np.ndarray):
            found = found.reshape(-1).tolist()
        ids = [as_sample_id("sample_id", value) for value in ([found] if isinstance(found, str | int) else found)]
        size = _disagreeing_size(batch, len(ids))
        if not ids or size is not None:
            rule = f"one id for each of the {size} samples of the batch" if size else "the ids of the batch"
            raise MissingRequirementError(expected("sample_id", rule, f"{len(ids)} ids"))
        return ids


def _parts_of(batch: Any) -> list[Any]:
    """The user's own batches in one of `UnlearningDataModule`, a mapping of parts; any other batch is the user's."""
    if isinstance(batch, Mapping) and batch and set(batch) <= set(get_args(Part)):
        return list(batch.values())
    return [batch]


def _is_keys(sample_keys: Any) -> bool:
    return callable(sample_keys) or (hasattr(sample_keys, "__len__") and hasattr(sample_keys, "__getitem__"))


class _ResolvedLoaders:
    """The taps of one set of loaders, and how their indices become ids."""

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

    def name(self, tap: IndexTap, indices: list[Any]) -> list[SampleId]:
        positions = self._positions[self.taps.index(tap)]
        found = [as_sample_id("index", index) for index in indices]
        if positions is not None:
            found = positions[np.asarray(found, dtype=np.int64)].tolist()
        if self._function is not None:
            return [as_sample_id("sample_keys", self._function(int(index))) for index in found]
        return found if self.keys is None else [self.keys[int(index)] for index in found]
