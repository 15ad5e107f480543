"""Grouped batches for an existing Trainer, without a change to dataset, loader or module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from lightning import Callback, LightningModule, Trainer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_unlearn.data.grouping import SubjectGroupedBatchSampler
from lightning_unlearn.data.loader_view import add_loader_step, loader_view, release_workers
from lightning_unlearn.data.sample_ids import root_length, root_positions
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import check_fraction, check_positive_int, expected

__all__ = ["SubjectGrouping"]

Subjects: TypeAlias = Sequence[SampleId | None] | Mapping[int, SampleId | None] | Callable[[int], SampleId | None]
"""Position of a row -> its subject, `None` where the row is not grouped."""

_ORDER = 0  # before anything that listens to the loader


class SubjectGrouping(Callback):
    """Replaces the batches of the training loader by those of `SubjectGroupedBatchSampler`.

    Batch size, `drop_last`, workers and everything else stay the loader's own, and the loader itself is not changed.
    Works with one device and with DDP. Put it next to `DeltaRecorder`, in any order.

    Args:
        subjects: Subject of each row of the underlying dataset (or of the loader's dataset), `None` where not grouped;
            or, as `sample_keys`, a mapping or function of the position in the underlying dataset.
        max_share: Largest share of a global batch for one subject.
        seed: Seed of the order.
        labels: Class of each row, like `subjects`; a warning is given where batches come out near one class.

    Raises:
        ValueError: an argument is out of range.
        UnsupportedStrategyError: in `fit`, before training: several loaders, iterable data, or a loader with its own
            batch sampler or a sampler that is neither random nor sequential.
    """

    def __init__(
        self,
        subjects: Subjects,
        *,
        max_share: float = 0.5,
        seed: int = 0,
        labels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not callable(subjects) and not isinstance(subjects, Mapping):
            if isinstance(subjects, str) or not isinstance(subjects, Iterable):
                remedy = "Give the subject of each row, `None` where it is not grouped."
                raise ValueError(expected("subjects", "a sequence, a mapping or a function", subjects, remedy))
            subjects = list(subjects)
            if labels is not None and len(labels) != len(subjects):
                raise ValueError(expected("labels", f"one for each of the {len(subjects)} subjects", len(labels)))
        self._subjects = subjects
        self._labels = None if labels is None else [int(label) for label in labels]
        self._max_share = check_fraction("max_share", max_share)
        self._seed = check_positive_int("seed", seed, zero=True)
        self._remove: Callable[[], None] | None = None
        self._loaders: list[DataLoader[Any]] = []
        self._samplers: list[tuple[SubjectGroupedBatchSampler, tuple[int, int]]] = []
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the training loader pass through this callback."""
        if stage == "fit":
            self._uninstall()
            self._trainer = trainer
            self._remove = add_loader_step(trainer, self._group, order=_ORDER)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse several loaders, whose batches together make a step."""
        combined = trainer.fit_loop._combined_loader
        n_loaders = 0 if combined is None else len(combined.flattened)
        if n_loaders != 1:
            got, remedy = f"{n_loaders} of them", "Train without `SubjectGrouping`, or put the data into one loader."
            raise UnsupportedStrategyError(expected("train_dataloader", "one loader", got, remedy))
        fetcher, now = trainer.fit_loop._data_fetcher, _place(trainer)
        for sampler, place in self._samplers:
            # A module that asks for `trainer.estimated_stepping_batches` as it configures its optimizers has the
            # loaders built before Lightning knows where the run goes on.
            if trainer.fit_loop.restarting and fetcher is not None and place != now:
                _go_on(sampler, now)
                iter(fetcher)  # workers may have fetched the first batches of another epoch

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._uninstall()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        if stage == "fit":
            self._uninstall()

    def _uninstall(self) -> None:
        if self._remove is not None:
            self._remove()
        for loader in self._loaders:
            release_workers(loader)
        self._remove, self._loaders, self._samplers, self._trainer = None, [], [], None

    def _group(self, loader: Any) -> Any:
        trainer = self._trainer
        _check_loader(loader)
        if trainer is None:
            return loader
        subjects = self._subjects
        if callable(subjects) or isinstance(subjects, Mapping):
            subject_of = subjects if callable(subjects) else subjects.get
            subjects = [subject_of(position) for position in range(root_length(loader.dataset))]
        chosen = _rows(loader.dataset, "subjects", len(subjects))
        replicas = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = SubjectGroupedBatchSampler(
            [subjects[row] for row in chosen],
            loader.batch_size,
            max_share=self._max_share,
            drop_last=loader.drop_last,
            seed=self._seed,
            labels=self._labels_of(loader.dataset),
            **replicas,
        )
        # Workers fetch before Lightning announces the epoch, which matters when a run is resumed.
        place = _place(trainer)
        _go_on(sampler, place)
        self._samplers = [(sampler, place)]
        self._loaders.append(loader)
        return loader_view(loader, {"batch_sampler": property(lambda view: sampler)})

    def _labels_of(self, dataset: Any) -> list[int] | None:
        if self._labels is None:
            return None
        return [self._labels[row] for row in _rows(dataset, "labels", len(self._labels))]


def _place(trainer: Trainer) -> tuple[int, int]:
    """The epoch, and how many of its batches a run that goes on has trained on already."""
    loop = trainer.fit_loop
    return trainer.current_epoch, loop.epoch_loop.batch_progress.current.ready if loop.restarting else 0


def _go_on(sampler: SubjectGroupedBatchSampler, place: tuple[int, int]) -> None:
    """A run that goes on in mid-epoch must not train on the first batches again: only the epoch decides the order."""
    epoch, done = place
    sampler.set_epoch(epoch)
    sampler.skip(done if done < len(sampler) else 0)


def _rows(dataset: Any, name: str, given: int) -> Sequence[int]:
    """For each row of the loader's dataset its place among `given` values, one a row of it or of the underlying one."""
    positions = root_positions(dataset)
    length = root_length(dataset)
    if given == length:
        return range(length) if positions is None else positions.tolist()
    if given == len(dataset):
        return range(len(dataset))
    rule = f"one for each of the {length} samples of the underlying dataset"
    raise ValueError(expected(name, rule, f"{given} {name}"))


def _check_loader(loader: Any) -> None:
    name, remedy = "train_dataloader", "Build its batches with `SubjectGroupedBatchSampler` yourself."
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        got = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
        raise UnsupportedStrategyError(expected(name, "a DataLoader over map-style data", got))
    if type(loader.batch_sampler) is not BatchSampler:
        got = type(loader.batch_sampler).__name__
        raise UnsupportedStrategyError(expected(name, "a DataLoader without a batch sampler of its own", got, remedy))
    if not isinstance(loader.sampler, RandomSampler | SequentialSampler | DistributedSampler):
        got = type(loader.sampler).__name__
        raise UnsupportedStrategyError(expected(name, "a DataLoader with a random or sequential sampler", got, remedy))
