"""Train on the user's own batches with some samples left out: the twin of a run that saw them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_unlearn.callbacks.thinned_batches import ThinnedBatches
from lightning_unlearn.data.index_tap import check_tappable
from lightning_unlearn.data.loader_view import add_loader_step, loader_view
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected

__all__ = ["LEAVE_OUT_ORDER", "LeaveOut"]

LEAVE_OUT_ORDER = 50
"""Behind whatever arranges the batches, before the recorder listens to them."""


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
        self._remove: Callable[[], None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the step into the Trainer."""
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise UnsupportedStrategyError(
                expected("devices", "1 to leave samples out of the same batches", trainer.world_size, "Use a subset.")
            )
        self._remove = add_loader_step(trainer, lambda loader: self._thin(trainer, loader), order=LEAVE_OUT_ORDER)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the step out again."""
        if self._remove is not None:
            self._remove()
            self._remove = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As `teardown`, which Lightning does not call after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def _thin(self, trainer: Trainer, loader: Any) -> Any:
        check_tappable(loader)
        # The one place where a DataLoader's iterators, of any kind, take their indices from.
        policy = ThinnedBatches(loader._index_sampler, trainer, self.positions)
        return loader_view(loader, {"_index_sampler": property(lambda view: policy)})
