"""Changing how a user's training loader draws its batches, without changing the user's loader.

Two small mechanisms. `loader_view` gives a second `DataLoader` object over the *same* state, of which a few attributes
answer differently: the user's object, its class and its samplers stay as they are, so there is nothing to restore.
`add_loader_step` lets several parties put such views into one Trainer, in an order independent of the callbacks'.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from lightning import Trainer
from torch.utils.data import DataLoader

__all__ = ["LoaderStep", "add_loader_step", "loader_view", "release_workers"]

LoaderStep: TypeAlias = Callable[[Any], Any]
"""Takes a training loader as the Trainer would use it and returns the one to use instead."""


def _itself(loader: Any) -> Any:
    return loader


def loader_view(loader: DataLoader[Any], attributes: Mapping[str, Any]) -> DataLoader[Any]:
    """Another face of `loader`: an instance of a subclass of its class that shares its `__dict__`.

    Args:
        loader: The loader to look at; it is not changed.
        attributes: Class attributes of the view (properties, methods) that take the place of the loader's.

    Returns:
        A loader of a subclass of the original's class. Pickling it gives the original.

    >>> loader = DataLoader([1, 2, 3])
    >>> view = loader_view(loader, {"__len__": lambda self: 7})
    >>> len(view), len(loader), isinstance(view, DataLoader), view.dataset is loader.dataset
    (7, 3, True, True)
    """
    base = type(loader)

    def reduce(self: Any, protocol: Any) -> Any:
        # An identity that pickles: the original itself takes the place of the view.
        return _itself, (loader,)

    def iterate(self: Any) -> Any:
        # Persistent workers come with an iterator of an earlier fit, which would draw from its own sampler.
        if getattr(self, "_iterator", None) is not None:
            self._iterator._index_sampler = self._index_sampler
        return base.__iter__(self)

    names = {
        "__iter__": iterate,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": reduce,
    }
    view_class = types.new_class(base.__name__, (base,), exec_body=lambda body: body.update({**names, **attributes}))
    view: DataLoader[Any] = object.__new__(view_class)
    object.__setattr__(view, "__dict__", vars(loader))
    return view


def release_workers(loader: DataLoader[Any]) -> None:
    """Leave workers that outlive a view of `loader` with the loader's own sampler."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._index_sampler = loader._index_sampler


class _LoaderPipeline:
    """What stands in for `strategy.process_dataloader` while anybody has a step in it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.inner = trainer.strategy.process_dataloader
        self.previous = vars(trainer.strategy).get("process_dataloader")
        self.steps: list[tuple[int, LoaderStep]] = []

    def __call__(self, loader: object) -> object:
        loader = self.inner(loader)
        # The same method serves validation loaders, during which the Trainer is not in the training stage.
        if self.trainer.training:
            for _, step in sorted(self.steps, key=lambda item: item[0]):
                loader = step(loader)
        return loader

    def remove(self, entry: tuple[int, LoaderStep]) -> None:
        if entry in self.steps:
            self.steps.remove(entry)
        attributes = vars(self.trainer.strategy)
        if not self.steps and attributes.get("process_dataloader") is self:
            if self.previous is None:
                del attributes["process_dataloader"]
            else:
                attributes["process_dataloader"] = self.previous


def add_loader_step(trainer: Trainer, step: LoaderStep, *, order: int) -> Callable[[], None]:
    """Send every training loader of `trainer` through `step`, just before its iterator is made.

    Later is too late, because workers prefetch from then on; earlier is too early, because the Trainer may build a new
    loader to inject a `DistributedSampler`.

    Args:
        trainer: The Trainer, whose strategy must be known (any hook from `setup` on).
        step: Called with each training loader.
        order: Lower numbers come first, independently of the order of installation.

    Returns:
        A function that takes the step out again; once the last step is gone, the strategy is as it was. It may be
        called several times.
    """
    attributes = vars(trainer.strategy)
    pipeline = attributes.get("process_dataloader")
    if not isinstance(pipeline, _LoaderPipeline):
        pipeline = attributes["process_dataloader"] = _LoaderPipeline(trainer)
    entry = (order, step)
    pipeline.steps.append(entry)
    return partial(pipeline.remove, entry)
