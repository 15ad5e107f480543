"""A loader's batches without some samples, in a Trainer that knows how many of them there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer

from lightning_unlearn.data.index_tap import check_tappable
from lightning_unlearn.data.loader_view import add_loader_step, loader_view
from lightning_unlearn.data.seeded_order import indices_in
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected

__all__ = ["THINNING_ORDER", "ThinnedBatches", "ThinningCallback"]

THINNING_ORDER = 50
"""Behind whatever arranges the batches, before the recorder listens to them."""


class ThinnedBatches:
    """A sampler or batch sampler without some positions; batches left empty are skipped.

    All of an epoch is drawn when the first batch is asked for, as most samplers do, because the Trainer has to know
    before it begins how many batches are left: at the last one accumulated gradients are applied, validation is run and
    schedules move on. Its length stays that of the user's own, so that schedules sized by it are those of the original
    run. An epoch of which nothing is left moves no schedule.

    Args:
        own: The user's sampler or batch sampler.
        trainer: The Trainer that draws.
        left_out: Positions to leave out.
        arrange: What the user's sampler drew in an epoch -> what takes its place, before anything is left out.
        unit: What goes with a position: itself, or every batch that holds it.

    Attributes:
        kept: What is left of the epoch that was drawn last.
    """

    def __init__(
        self,
        own: Any,
        trainer: Trainer,
        left_out: frozenset[int],
        arrange: Callable[[list[Any]], Iterable[Any]] = list,
        unit: Literal["samples", "batches"] = "samples",
    ) -> None:
        self._own = own
        self._trainer = trainer
        self._left_out = left_out
        self._arrange = arrange
        self._unit = unit
        self._checks_at_end: bool | None = None
        self._counted: float = float("inf")
        self.kept: list[Any] | None = None

    def begin(self) -> None:
        """To be called once the Trainer has set up its loaders, and again before every epoch.

        Workers prefetch while it sets them up, so the first epoch may be drawn before it counts the loader's batches.
        """
        if self._checks_at_end is None:  # as the Trainer found it: later epochs would find what is put there below
            self._counted = self._trainer.fit_loop.max_batches
            self._checks_at_end = vars(self._trainer)["val_check_batch"] == self._counted
        self._tell()

    def __iter__(self) -> Iterator[Any]:
        # Called now, not at the first `next`: some samplers draw their permutation here.
        return self._batches(iter(self._own))

    def _batches(self, drawn: Iterator[Any]) -> Iterator[Any]:
        items = list(drawn)[: self._most()]  # of these the original run saw no more
        self.kept = [one for one in map(self.thin, self._arrange(items)) if one is not None]
        self._tell()
        yield from self.kept

    def _most(self) -> int | None:
        limit = vars(self._trainer)["limit_train_batches"]
        if not isinstance(limit, int):
            limit = float("inf") if limit == 1.0 else int(len(self._own) * limit)
        # A sampler may grow between being counted and being drawn; what was not counted is not trained on.
        most = min(limit, self._counted)
        return None if most == float("inf") else int(most)

    def _tell(self) -> None:
        if self.kept is None or self._checks_at_end is None:
            return
        left = max(1, len(self.kept))  # at 0 the Trainer would end the whole fit, not the epoch
        self._trainer.fit_loop.max_batches = left
        if self._checks_at_end:
            vars(self._trainer)["val_check_batch"] = left

    def thin(self, item: Any) -> Any:
        """A batch without what is to be left out; `None` where nothing is left, or for a single one that is."""
        left = [position for position in indices_in(item) if int(position) not in self._left_out]
        if not left or (self._unit == "batches" and len(left) < len(indices_in(item))):
            return None
        return left if isinstance(item, Sequence) else item

    def __len__(self) -> int:
        return len(self._own)


class ThinningCallback(Callback):
    """What `LeaveOut` and its like share: a view of the training loader in the Trainer, and nothing of it afterwards.

    Subclasses call `install` in `setup`, and say in `policy` what takes the place of the loader's own sampler.
    """

    def __init__(self) -> None:
        self._release: list[Callable[[], None]] = []
        self._policy: ThinnedBatches | None = None

    def policy(self, trainer: Trainer, loader: Any) -> ThinnedBatches:
        """The batches of `loader`, a map-style `DataLoader`."""
        raise NotImplementedError

    def view(self, loader: Any, policy: ThinnedBatches) -> Any:
        """What the Trainer iterates instead of `loader`."""
        # The one place where a DataLoader's iterators, of any kind, take their indices from.
        return loader_view(loader, {"_index_sampler": property(lambda view: policy)})

    def install(self, trainer: Trainer, purpose: str) -> None:
        """Put the step into the Trainer.

        Raises:
            UnsupportedStrategyError: several processes, whose batch counts could differ and hang.
        """
        if trainer.world_size > 1:
            rule, remedy = f"1 to {purpose}", "Use one device."
            raise UnsupportedStrategyError(expected("devices", rule, trainer.world_size, remedy))
        self._policy = None
        self._release.append(add_loader_step(trainer, lambda loader: self._step(trainer, loader), order=THINNING_ORDER))

    def _step(self, trainer: Trainer, loader: Any) -> Any:
        check_tappable(loader)
        self._policy = self.policy(trainer, loader)
        return self.view(loader, self._policy)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the Trainer how many batches are left, where its workers have drawn them by now."""
        if self._policy is not None:
            self._policy.begin()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `on_train_start`, for loaders that are made anew in later epochs."""
        if self._policy is not None:
            self._policy.begin()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the step out again."""
        for release in self._release:
            release()
        self._release, self._policy = [], None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As `teardown`, which Lightning does not call after an exception."""
        self.teardown(trainer, pl_module, "fit")
