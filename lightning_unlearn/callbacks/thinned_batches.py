"""A loader's batches without some samples, in a Trainer that knows how many of them there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lightning import Trainer

__all__ = ["ThinnedBatches"]


class ThinnedBatches:
    """A sampler or batch sampler without some positions; batches left empty are skipped.

    All of an epoch is drawn when the first batch is asked for, as most samplers do, because the Trainer has to know
    before it begins how many batches are left: at the last one accumulated gradients are applied, validation is run and
    schedules move on. Its length stays that of the user's own, so that schedules sized by it are those of the original
    run.

    Args:
        own: The user's sampler or batch sampler.
        trainer: The Trainer that draws.
        left_out: Positions to leave out.
        arrange: What the user's sampler drew in an epoch -> what takes its place, before anything is left out.
    """

    def __init__(
        self,
        own: Any,
        trainer: Trainer,
        left_out: frozenset[int],
        arrange: Callable[[list[Any]], Iterable[Any]] = list,
    ) -> None:
        self._own = own
        self._trainer = trainer
        self._left_out = left_out
        self._arrange = arrange
        self._limits: tuple[Any, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        # Called now, not at the first `next`: some samplers draw their permutation here.
        return self._batches(iter(self._own))

    def _batches(self, drawn: Iterator[Any]) -> Iterator[Any]:
        loop = self._trainer.fit_loop
        if self._limits is None:  # as the Trainer found them: later epochs would find what is put there below
            self._limits = loop.max_batches, vars(self._trainer)["val_check_batch"]
        most, check = self._limits
        items = list(drawn)
        if most != float("inf"):  # of these the original run saw no more
            items = items[: int(most)]
        kept = [one for one in map(self.thin, self._arrange(items)) if one is not None]
        loop.max_batches = len(kept)
        if check == most:
            vars(self._trainer)["val_check_batch"] = max(1, len(kept))
        yield from kept

    def thin(self, item: Any) -> Any:
        """A batch without the positions that are left out; `None` where none is left, or for a single one that is."""
        if isinstance(item, Sequence):
            return [position for position in item if int(position) not in self._left_out] or None
        return None if int(item) in self._left_out else item

    def __len__(self) -> int:
        return len(self._own)
