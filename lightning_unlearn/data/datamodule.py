"""The user's data, split by sample id: batches of `{"forget": ..., "retain": ...}` for a forgetting pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from lightning_unlearn.data.plain_loaders import datamodule_of_loaders
from lightning_unlearn.data.positions import RootIndex, SampleKeys
from lightning_unlearn.data.splits import Positions, check_splittable, sample_ids_of, split_positions, subset_loader
from lightning_unlearn.data.users_hooks import PartwiseHook, StageHook, TrainLoaders, UsersHook, inherited, owned
from lightning_unlearn.exceptions import DeletionRequestError, UnsupportedStrategyError
from lightning_unlearn.types import Part, SampleId
from lightning_unlearn.utilities.checks import check_choice, expected
from lightning_unlearn.utilities.facade import check_shareable, facade_class, on_same_state

__all__ = ["UnlearningDataModule"]

_PARTS: tuple[Part, ...] = ("forget", "retain")


@dataclass(frozen=True)
class _Settings:
    """What one facade knows beyond the user's datamodule; `done` is shared by all facades on it."""

    forget: tuple[SampleId, ...]
    sample_keys: SampleKeys | None
    parts: tuple[Part, ...]
    seed: int | None
    plain: bool = False
    schedule: tuple[tuple[Part, ...], ...] | None = None
    done: set[str] = field(default_factory=set)


class UnlearningDataModule(LightningDataModule):
    """A user's datamodule or loaders whose training batches are split into the parts a method uses.

    `train_dataloader()` gives `{"forget": loader, "retain": loader}` (the declared parts only), so a training batch
    is a mapping of parts; with both parts the shorter one is cycled. Validation, test and prediction are the user's.
    The object stands on the user's own state (`utilities/facade.py`) and is an instance of the user's class as well:
    `setup`, hyper-parameters, saved state and transfer hooks stay theirs, and the user's object is not changed.

    Args:
        data: The datamodule or the training loader of the original training, or a mapping of loaders with `"train"`
            and optionally `"val"` and `"test"`.
        forget: What to forget: positions in the underlying dataset, or keys with `sample_keys`.
        sample_keys: Position in the underlying dataset -> stable key of a data subject; one key may name many rows.
        parts: Parts of a training batch.
        seed: Seeds the shuffling of the parts; by default the user's generator, cloned, or the global state.

    Raises:
        DeletionRequestError: `forget` is empty, holds repeats or, once the data is set up, unknown ids; or nothing is
            left to retain although the parts ask for it.
        UnsupportedStrategyError: the training data is not one `DataLoader` of a map-style dataset.
        ValueError: unknown parts or loader names.

    >>> data = UnlearningDataModule(DataLoader(range(6), batch_size=2), forget=[1, 4])
    >>> [batch.tolist() for batch in data.forget_loader()]
    [[1, 4]]
    >>> [batch.tolist() for batch in data.retain_loader()]
    [[0, 2], [3, 5]]
    >>> list(data.train_dataloader())
    ['retain']
    """

    __slots__ = ("_settings", "_users")

    _settings: _Settings
    _users: LightningDataModule
    _facade_of: ClassVar[type[UnlearningDataModule]]

    prepare_data: Any = UsersHook()
    setup: Any = StageHook()
    teardown: Any = StageHook()
    train_dataloader: Any = TrainLoaders()
    val_dataloader: Any = UsersHook()
    test_dataloader: Any = UsersHook()
    predict_dataloader: Any = UsersHook()
    state_dict: Any = UsersHook()
    load_state_dict: Any = UsersHook()
    on_exception: Any = UsersHook()
    on_before_batch_transfer: Any = PartwiseHook()
    transfer_batch_to_device: Any = PartwiseHook()
    on_after_batch_transfer: Any = PartwiseHook()

    def __new__(cls, data: Any, *args: Any, **kwargs: Any) -> Self:
        """An object of the class `(cls, class of the user's datamodule)` on the user's state."""
        users = data if isinstance(data, LightningDataModule) else datamodule_of_loaders(data)
        if isinstance(users, UnlearningDataModule):
            rule = "the user's own data"
            raise TypeError(expected("data", rule, type(data), "Use `with_parts` for other parts of the same split."))
        check_shareable(type(users), "data")
        return _on(cls, users)

    def __init__(
        self,
        data: LightningDataModule | DataLoader[Any] | Mapping[str, DataLoader[Any]],
        forget: Collection[SampleId],
        *,
        sample_keys: SampleKeys | None = None,
        parts: tuple[Part, ...] = ("retain",),
        seed: int | None = None,
    ) -> None:
        # No `super().__init__()`: the state is the user's and already initialised.
        if isinstance(forget, (str, bytes)) or not isinstance(forget, Collection) or not forget:
            raise DeletionRequestError(expected("forget", "a non-empty collection of sample ids", forget))
        self._settings = _Settings(tuple(forget), sample_keys, _checked_parts(parts), seed)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was built on the fly and has no importable name; the user's object pickles by its own rules.
        return _rebuild, (self._facade_of, self._users, self._settings)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Parts of a training batch."""
        return self._settings.parts

    @owned
    def with_parts(
        self, parts: tuple[Part, ...], schedule: Sequence[tuple[Part, ...]] | None = None
    ) -> UnlearningDataModule:
        """The same data and split with other parts in a training batch; both objects may be used.

        Args:
            parts: Parts of a training batch.
            schedule: Parts of each epoch, where they differ; the last ones stay. The Trainer has to reload its loaders
                every epoch (`reload_dataloaders_every_n_epochs=1`).
        """
        by_epoch = None if not schedule else tuple(_checked_parts(one) for one in schedule)
        settings = replace(self._settings, parts=_checked_parts(parts), schedule=by_epoch)
        return _rebuild(self._facade_of, self._users, settings)

    @owned
    def retain_only(self) -> UnlearningDataModule:
        """The same data for an ordinary training without the forgotten samples: plain batches of the retain part."""
        return _rebuild(self._facade_of, self._users, replace(self._settings, parts=("retain",), plain=True))

    @property
    def users_data(self) -> LightningDataModule:
        """The user's own datamodule; plain loaders stand in a minimal one."""
        return self._users

    @property
    def sample_keys(self) -> SampleKeys | None:
        """As given; `None` where ids are positions."""
        return self._settings.sample_keys

    @property
    def forget_positions(self) -> Positions:
        """Ascending positions of the samples to forget in the training loader's dataset."""
        return self.__split(self.__users_train_loader())[0]

    @property
    def retain_positions(self) -> Positions:
        """Ascending positions of all other training samples; may be empty."""
        return self.__split(self.__users_train_loader())[1]

    @property
    def sample_ids(self) -> list[SampleId]:
        """The id of every position of the training loader's dataset: underlying positions, or `sample_keys`."""
        return sample_ids_of(self.__users_train_loader().dataset, self._settings.sample_keys)

    @property
    def batch_size(self) -> int | None:
        """Batch size of the training loader; `None` where a batch sampler decides."""
        return self.__users_train_loader().batch_size

    @property
    def root_length(self) -> int | None:
        """Number of samples of the dataset that positions count, beneath subsets and concatenations."""
        index = RootIndex()
        index.positions(self.__users_train_loader().dataset)
        return index.length

    @owned
    def forget_loader(self) -> DataLoader[Any]:
        """The data to forget for evaluation: in order, every sample once; the user's transforms are kept as they are.

        Works outside a Trainer: `prepare_data` and `setup("fit")` are called if nobody did, and what a datamodule does
        to batches around their transfer is done where they are collated.
        """
        loader = self.__users_train_loader()
        return self.__in_order(loader, self.__split(loader)[0])

    @owned
    def retain_loader(self) -> DataLoader[Any]:
        """The data to keep for evaluation, as `forget_loader`.

        Raises:
            DeletionRequestError: everything is to be forgotten.
        """
        loader = self.__users_train_loader()
        return self.__in_order(loader, self.__retained(loader))

    @property
    def has_validation(self) -> bool:
        """Whether the user has a hook for validation data; `val_loader` sees what it gives."""
        return not inherited(self._users.val_dataloader, "val_dataloader")

    @owned
    def val_loader(self) -> DataLoader[Any] | None:
        """The user's validation data in order, every sample once; `None` where there is none.

        Raises:
            UnsupportedStrategyError: several loaders, or an iterable dataset.
        """
        return self.__evaluation_loader("val", "fit")

    @owned
    def test_loader(self) -> DataLoader[Any] | None:
        """The user's test data in order, every sample once; `None` where there is none."""
        return self.__evaluation_loader("test", "test")

    def __prepare(self, stage: str) -> None:
        done = self._settings.done
        if self._users.trainer is None and "prepare_data" not in done:
            self._users.prepare_data()
            done.add("prepare_data")
        if stage not in done:
            self.setup(stage=stage)

    def __users_train_loader(self) -> DataLoader[Any]:
        self.__prepare("fit")
        return check_splittable(self._users.train_dataloader())

    def __split(self, loader: DataLoader[Any]) -> tuple[Positions, Positions]:
        return split_positions(loader, self._settings.forget, self._settings.sample_keys)

    def __retained(self, loader: DataLoader[Any]) -> Positions:
        retained = self.__split(loader)[1]
        if not retained.size:
            rule = "fewer samples than the training data has"
            raise DeletionRequestError(expected("forget", rule, f"all {len(self._settings.forget)} of them"))
        return retained

    def __evaluation_loader(self, name: str, stage: str) -> DataLoader[Any] | None:
        hook = getattr(self._users, f"{name}_dataloader")
        if inherited(hook, f"{name}_dataloader"):
            return None
        self.__prepare(stage)
        loader = hook()
        if isinstance(loader, (list, tuple)) and len(loader) <= 1:
            loader = loader[0] if loader else None
        if loader is None:
            return None
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            rule = "one torch DataLoader of a map-style dataset, of whose samples some can be drawn"
            got = loader.dataset if isinstance(loader, DataLoader) else loader
            remedy = f'Pass such loaders, `data={{"train": ..., "{name}": ...}}`.'
            raise UnsupportedStrategyError(expected(f"{name}_dataloader", rule, type(got).__name__, remedy))
        if not len(loader.dataset):  # type: ignore[arg-type]
            return None
        return self.__in_order(loader, range(len(loader.dataset)))  # type: ignore[arg-type]

    def __in_order(self, loader: DataLoader[Any], positions: Iterable[int]) -> DataLoader[Any]:
        part = subset_loader(loader, positions, part=None)
        names = ("on_before_batch_transfer", "on_after_batch_transfer")
        hooks = [hook for name in names if not inherited(hook := getattr(self._users, name), name)]
        if hooks:
            part.collate_fn = functools.partial(_collate, part.collate_fn, hooks)
        return part

    @owned
    def _part_loaders(self) -> dict[Part, DataLoader[Any]]:
        """The training form of the declared parts, sharded where a process group is running."""
        loader = self.__users_train_loader()
        parts = self.__parts_now()
        positions = {"forget": self.__split(loader)[0]}
        if "retain" in parts:
            positions["retain"] = self.__retained(loader)
        seed = self._settings.seed
        return {
            part: subset_loader(
                loader,
                positions[part],
                part=part,
                seed=None if seed is None else seed + _PARTS.index(part) + len(_PARTS) * self.__epoch(),
                replicas=self.__replicas(),
            )
            for part in parts
        }

    def __epoch(self) -> int:
        """The epoch whose loaders are asked for; 0 where one set of loaders serves them all."""
        trainer = self._users.trainer
        return 0 if trainer is None or self._settings.schedule is None else int(trainer.current_epoch)

    def __parts_now(self) -> tuple[Part, ...]:
        schedule = self._settings.schedule
        if schedule is None:
            return self.parts
        return schedule[min(self.__epoch(), len(schedule) - 1)]

    @owned
    def _plain_retain_loader(self) -> DataLoader[Any]:
        return self._part_loaders()["retain"]

    def __replicas(self) -> tuple[int, int] | None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        trainer = self._users.trainer
        shared = None if trainer is None else trainer.distributed_sampler_kwargs
        if not shared:
            return None
        return shared["num_replicas"], shared["rank"]


def _checked_parts(parts: Collection[Part]) -> tuple[Part, ...]:
    for part in parts:
        check_choice("parts", part, _PARTS)
    if not parts:
        raise ValueError(expected("parts", "at least one part of the data", parts))
    return tuple(part for part in _PARTS if part in parts)


def _collate(collate: Callable[..., Any], hooks: list[Callable[..., Any]], samples: Any) -> Any:
    batch = collate(samples)
    for hook in hooks:
        batch = hook(batch, 0)
    return batch


_Wrapper = TypeVar("_Wrapper", bound=UnlearningDataModule)


def _on(wrapper: type[_Wrapper], users: LightningDataModule) -> _Wrapper:
    instance: _Wrapper = on_same_state(facade_class(wrapper, type(users)), users.__dict__)
    instance._users = users
    return instance


def _rebuild(wrapper: type[_Wrapper], users: LightningDataModule, settings: _Settings) -> _Wrapper:
    instance = _on(wrapper, users)
    instance._settings = settings
    return instance
