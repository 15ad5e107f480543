"""A `training_step(dataloader_iter)` that fetches ahead of what it trains on."""

from __future__ import annotations

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected

__all__ = ["FetchWatch"]

_ENOUGH = 3


class FetchWatch:
    """Notices what a pipeline looks like from outside: more batches in the first step than in those that follow.

    Heuristic: a step that keeps a batch for later without ever fetching more than one at once does not show.

    >>> watch = FetchWatch()
    >>> for fetched in (0, 2, 3, 4):
    ...     watch.begin(fetched)
    >>> watch.begin(5)
    Traceback (most recent call last):
    ...
    lightning_unlearn.exceptions.UnsupportedStrategyError: Expected `training_step` to be one that trains on ...
    """

    def __init__(self) -> None:
        self._fetched: list[int] = []

    def begin(self, fetched: int) -> None:
        """A step begins.

        Args:
            fetched: Number of batches that were fetched so far.

        Raises:
            UnsupportedStrategyError: the first step of the epoch fetched more than each of the next three.
        """
        if len(self._fetched) > _ENOUGH + 1:
            return
        self._fetched.append(fetched)
        counts = [after - before for before, after in zip(self._fetched[:-1], self._fetched[1:], strict=True)]
        if len(counts) == _ENOUGH + 1 and counts[0] > counts[1] and len(set(counts[1:])) == 1:
            rule = "one that trains on every batch in the step that fetches it"
            got = f"{counts[0]} batches fetched in the first step of the epoch and {counts[1]} in each of the next"
            remedy = "Do not fetch ahead while recording, or take `batch` instead of `dataloader_iter`."
            raise UnsupportedStrategyError(expected("training_step", rule, got, remedy))

    def reset(self) -> None:
        """An epoch is over."""
        self._fetched = []
