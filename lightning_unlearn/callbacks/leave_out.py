"""Train on the user's own batches with some samples left out: the twin of a run that saw them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lightning import LightningModule, Trainer

from lightning_unlearn.callbacks.thinned_batches import ThinnedBatches, ThinningCallback

__all__ = ["LeaveOut"]


class LeaveOut(ThinningCallback):
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
        super().__init__()
        self.positions = frozenset(int(position) for position in positions)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the step into the Trainer."""
        if stage == "fit":
            self.install(trainer, "leave samples out of the same batches")

    def policy(self, trainer: Trainer, loader: Any) -> ThinnedBatches:
        """The loader's own batches without the samples."""
        return ThinnedBatches(loader._index_sampler, trainer, self.positions)
