"""Whose batches are behind the next step of each optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_unlearn.types import SampleId

__all__ = ["PendingIds"]


class PendingIds:
    """The ids that were seen since each optimizer's own last step.

    With several optimizers a batch is behind a step of each of them, so that what one of them takes stays for the
    others: rather too many samples are named than one too few.

    >>> pending = PendingIds(2)
    >>> pending.add([1, 2]); pending.take(0)
    [1, 2]
    >>> pending.add([3]); pending.take(0), pending.take(1)
    ([3], [1, 2, 3])

    Args:
        n_optimizers: Number of optimizers.
    """

    def __init__(self, n_optimizers: int) -> None:
        self._pending: list[list[SampleId]] = [[] for _ in range(n_optimizers)]
        self._latest: list[SampleId] = []

    def add(self, ids: Sequence[SampleId]) -> None:
        """Note a batch."""
        self._latest = list(ids)
        for pending in self._pending:
            pending.extend(ids)

    def take(self, optimizer: int) -> list[SampleId]:
        """Ids behind the step that this optimizer has just made.

        A second step on the same batch belongs to that batch as well.
        """
        ids, self._pending[optimizer] = self._pending[optimizer] or self._latest, []
        return ids
