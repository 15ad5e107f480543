"""Train on the user's own batches with some samples left out: the twin of a run that saw them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected

__all__ = ["LeaveOut"]


class LeaveOut(Callback):
    """Drop samples from the batches of the training loader; everything else of the run stays as it is.

    The loader draws exactly the batches it would draw with the samples in, so random state, order and the number of
    scheduled steps are those of the original run. A batch left empty is skipped.

    Args:
        positions: Positions in the dataset of the training loader.

    Raises:
        UnsupportedStrategyError: (in `setup`) several processes, whose batch counts could differ and hang; or, when
            data is loaded, a training loader that is no map-style `DataLoader`.
    """

    def __init__(self, positions: Collection[int]) -> None:
        self.positions = frozenset(int(position) for position in positions)
        self._restore: list[tuple[Any, str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand behind whatever arranges the batches; in `setup`, so that a recorder sees the thinned batches."""
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise UnsupportedStrategyError(
                expected("devices", "1 to leave samples out of the same batches", trainer.world_size, "Use a subset.")
            )
        strategy = trainer.strategy
        process = strategy.process_dataloader

        def thinned(loader: object) -> object:
            processed = process(loader)
            return self._thin(processed) if trainer.training else processed

        # An instance attribute shadows the method; removing it restores the class's own.
        shadowed = strategy.__dict__.get("process_dataloader")
        self._restore.append((strategy, "process_dataloader", shadowed))
        strategy.__dict__["process_dataloader"] = thinned

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the user's loaders and the strategy as they were."""
        while self._restore:
            owner, name, value = self._restore.pop()
            if value is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As `teardown`, which Lightning does not call after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def _thin(self, loader: object) -> object:
        if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__getitem__"):
            raise UnsupportedStrategyError(
                expected("the training loader", "a DataLoader over a map-style dataset", type(loader))
            )
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        policy = getattr(loader, name)
        self._restore.append((loader, name, policy))
        # Past DataLoader.__setattr__, which refuses to exchange samplers after construction.
        loader.__dict__[name] = _Without(policy, self.positions)
        return loader


class _Without:
    """A sampler or batch sampler without some positions; batches left empty are skipped."""

    def __init__(self, policy: Any, left_out: frozenset[int]) -> None:
        self._policy = policy
        self._left_out = left_out

    def __iter__(self) -> Iterator[Any]:
        for item in self._policy:
            if isinstance(item, Sequence):
                kept = [position for position in item if int(position) not in self._left_out]
                if kept:
                    yield kept
            elif int(item) not in self._left_out:
                yield item

    def __len__(self) -> int:
        # The original's length: schedules sized by it stay those of the original run.
        return len(self._policy)

    def __getattr__(self, name: str) -> Any:
        # Lightning reaches `.sampler.set_epoch` through the batch sampler. Guard against recursion while unpickling.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._policy, name)
