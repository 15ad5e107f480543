"""Who is in this batch: sample ids, captured without touching the user's module, dataset or loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from warnings import warn

from lightning import Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_unlearn.data.batch_ids import IdSource, disagreeing_size, ids_in
from lightning_unlearn.data.index_tap import BatchTap, IndexTap
from lightning_unlearn.data.loader_view import add_loader_step
from lightning_unlearn.data.own_fetching import FetchWatch
from lightning_unlearn.data.positions import SampleKeys, resolve_keys, root_length, root_positions
from lightning_unlearn.data.resolved_loaders import ResolvedLoaders
from lightning_unlearn.exceptions import MissingRequirementError, StoreMismatchError, UnlearningWarning
from lightning_unlearn.types import DataFingerprint, Identity, SampleId
from lightning_unlearn.utilities.checks import expected

__all__ = ["TAP_ORDER", "BatchIdentity", "SampleKeys", "resolve_keys", "root_length", "root_positions"]

TAP_ORDER = 100
"""Place of the tap among the loader steps: last, so that it hears the batches that are really used."""


class BatchIdentity:
    """The ids of every training batch of one Trainer.

    By default an id is the position that the underlying dataset receives (`root_positions`), taken from the loader's
    own sampler as the batch is handed over: exact for any sampler, number of workers, strategy that splits the
    sampler, and combination of loaders, and no random number is drawn. Positions mean something only for that very
    dataset; `sample_keys` turns them into stable keys. Iterable data needs `sample_id`.

    Where `training_step(dataloader_iter)` fetches its batches itself, each is taken to be trained on in the step that
    fetches it; a step that fetches ahead is refused where that shows in the number of its batches.

    Args:
        sample_id: Key (or attribute) of the batch that holds its ids, or a function of the batch that returns them.
        sample_keys: Position of a sample in the underlying dataset -> its key; see `resolve_keys`.
        digest: Hash of the data, if the user has one, for `fingerprint`.

    Raises:
        ValueError: both `sample_id` and `sample_keys` were given, or one is of the wrong type.
    """

    def __init__(
        self,
        sample_id: IdSource | None = None,
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
        self._batch_taps: list[BatchTap] = []
        self._resolved: ResolvedLoaders | None = None
        self._fetching: FetchWatch | None = None
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

    @property
    def fetches_itself(self) -> bool:
        """Whether `training_step(dataloader_iter)` fetches its batches: then `delivered_ids` says who was in them."""
        return self._fetching is not None

    def install(self, trainer: Trainer) -> None:
        """Start listening; to be called in `setup`, before the Trainer builds its loaders.

        Raises:
            UnsupportedStrategyError: later, as the Trainer sets up its loaders: one of them cannot be listened to.
                Nothing has been trained then.
        """
        self.uninstall()
        self._trainer = trainer
        step = trainer.lightning_module.training_step
        if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
            self._fetching = FetchWatch()
            warn(
                "`training_step` fetches its own batches: each is recorded with the optimizer step that follows its "
                "fetching, so a batch that is kept for a later step would be recorded under the wrong one.",
                UnlearningWarning,
                stacklevel=3,
            )
        if self._sample_id is None:
            self._remove = add_loader_step(trainer, self._tap, order=TAP_ORDER)
        elif self.fetches_itself:
            self._remove = add_loader_step(trainer, self._tap_batches, order=TAP_ORDER)

    def uninstall(self) -> None:
        """Stop listening and leave nothing behind; may be called at any time, any number of times."""
        if self._remove is not None:
            self._remove()
        for tap in self._taps:
            tap.close()
        self._trainer = self._remove = self._resolved = self._fetching = None
        self._taps, self._batch_taps = [], []

    def end_epoch(self) -> None:
        """Forget what was fetched beyond the last batch of the epoch; to be called in `on_train_epoch_end`."""
        for tap in self._taps:
            tap.clear()
        if self._fetching is not None:
            self._fetching.reset()

    def begin_step(self) -> None:
        """To be called in `on_train_batch_start` where the step fetches its batches itself.

        Raises:
            UnsupportedStrategyError: the steps so far have fetched ahead of what they trained on.
        """
        if self._fetching is not None:
            counts = [*(tap.count for tap in self._taps), *(tap.count for tap in self._batch_taps)]
            self._fetching.begin(max(counts, default=0))

    def delivered_ids(self) -> list[SampleId]:
        """Ids of everything that was fetched since the last call, where the step fetches its batches itself."""
        if self._sample_id is not None:
            return [sample for tap in self._batch_taps for sample in tap.take_all()]
        resolved = self._resolve()
        return [sample for tap in resolved.taps for sample in resolved.name(tap, tap.take_all())]

    def batch_ids(self, batch: Any) -> list[SampleId]:
        """Ids of this rank's current batch, in order and with repeats; to be called once in `on_train_batch_start`.

        Raises:
            MissingRequirementError: nobody knows who is in the batch: `sample_id` finds no ids in it, or not one for
                each of its samples, or the loader delivered it unheard.
            DeletionRequestError: an id is neither an int nor a str.
        """
        if self._sample_id is not None:
            return ids_in(batch, self._sample_id)
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

    def _tap_batches(self, loader: Any) -> Any:
        source = self._sample_id or (lambda batch: ())
        tap = BatchTap(loader, lambda batch: ids_in(batch, source))
        self._batch_taps.append(tap)
        return tap.view

    def _resolve(self) -> ResolvedLoaders:
        combined = self._installed().fit_loop._combined_loader
        if self._resolved is None or self._resolved.source is not combined:
            before = self._resolved
            self._resolved = ResolvedLoaders(combined, self._sample_keys)
            if before is not None and self.identity == "position" and before.length != self._resolved.length:
                remedy = "Positions of one dataset mean nothing in another: pass `sample_keys`."
                rule = f"the same dataset of {before.length} samples in every epoch"
                raise StoreMismatchError(expected("train_dataloader", rule, self._resolved.length, remedy))
            self._taps = [tap for tap in self._taps if tap in self._resolved.taps]
        return self._resolved

    def _compare_size(self, batch: Any, n: int, resolved: ResolvedLoaders) -> None:
        batched = len(resolved.taps) == 1 and resolved.taps[0].loader.batch_sampler is not None
        if self._warned or not batched:
            return
        size = disagreeing_size(batch, n)
        if size is not None:
            self._warned = True
            remedy = "Where the dataset or `collate_fn` drops or replaces samples, pass `sample_id=`."
            rule = f"as long as the {n} indices that were drawn for it"
            warn(expected("batch", rule, size, remedy), UnlearningWarning, stacklevel=3)


def _is_keys(sample_keys: Any) -> bool:
    return callable(sample_keys) or (hasattr(sample_keys, "__len__") and hasattr(sample_keys, "__getitem__"))
