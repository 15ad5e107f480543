"""Any samples of the training data as one batch: what the batches of a recorded run are made from again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Subset

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.data.splits import check_splittable
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected

__all__ = ["BatchMaker", "batches_in_epoch"]


class BatchMaker:
    """Makes batches of the training loader's dataset, as its evaluation loaders have them, but of any positions.

    In this process, without workers, so that no random state moves and any batch can be asked for at any time.

    Args:
        data: The split data.

    Raises:
        UnsupportedStrategyError: the training loader does not batch: its items may be whole batches.

    >>> from torch.utils.data import DataLoader
    >>> data = UnlearningDataModule(DataLoader(range(6), batch_size=2), forget=[1])
    >>> BatchMaker(data)([5, 0, 3])
    tensor([5, 0, 3])
    """

    def __init__(self, data: UnlearningDataModule) -> None:
        loader = data.forget_loader()
        if loader.batch_sampler is None or not isinstance(loader.dataset, Subset):
            rule, remedy = "one that batches, to put samples together anew", "Give the training loader a batch size."
            raise UnsupportedStrategyError(expected("data", rule, "a loader with batch_size=None", remedy))
        self._dataset: Any = loader.dataset.dataset
        self._collate = loader.collate_fn

    def __call__(self, positions: Sequence[int]) -> Any:
        """The batch of these positions."""
        together = getattr(self._dataset, "__getitems__", None)
        samples = together(list(positions)) if together else [self._dataset[position] for position in positions]
        return self._collate(samples)


def batches_in_epoch(data: UnlearningDataModule) -> int:
    """How many batches an epoch of the training loader has.

    >>> from torch.utils.data import DataLoader
    >>> batches_in_epoch(UnlearningDataModule(DataLoader(range(7), batch_size=2), forget=[1]))
    4
    """
    _ = data.batch_size  # sets the user's data up, where nobody did
    return len(check_splittable(data.users_data.train_dataloader()))
