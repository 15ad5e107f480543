"""A random part of the data in evaluation form, also one sample at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_unlearn.data.splits import check_splittable, subset_loader
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected

__all__ = ["drawn_loader"]


def drawn_loader(
    loader: DataLoader[Any], max_samples: int | None = None, *, seed: int = 0, single: bool = False
) -> DataLoader[Any]:
    """At most `max_samples` samples of a loader's dataset, drawn without replacement, in order.

    Args:
        loader: An evaluation loader, as `UnlearningDataModule.retain_loader` gives it.
        max_samples: How many; `None` for all.
        seed: Of the draw; the global random state is not read.
        single: Whether every batch is one sample.

    Raises:
        UnsupportedStrategyError: `single`, and the loader does not batch: its items may be whole batches.

    >>> [batch.tolist() for batch in drawn_loader(DataLoader(range(9), batch_size=4), 3, seed=1, single=True)]
    [[0], [4], [6]]
    """
    n = len(check_splittable(loader).dataset)  # type: ignore[arg-type]
    positions = list(range(n))
    if max_samples is not None and max_samples < n:
        # Evenly spaced or first samples would follow the order of the data, which is often that of its classes.
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        positions = order[:max_samples].tolist()
    drawn = subset_loader(loader, positions, part=None)
    if not single or drawn.batch_size == 1:
        return drawn
    carried = {
        name: getattr(drawn, name)
        for name in ("num_workers", "collate_fn", "timeout", "worker_init_fn", "multiprocessing_context")
    }
    if drawn.batch_size is not None:
        return DataLoader(drawn.dataset, batch_size=1, **carried)
    if isinstance(drawn.sampler, BatchSampler):  # the dataset is indexed with whole lists
        one_by_one = BatchSampler(SequentialSampler(range(len(positions))), 1, drop_last=False)
        return DataLoader(drawn.dataset, batch_size=None, sampler=one_by_one, **carried)
    rule, remedy = "one that batches, to take samples one by one", "Give the training loader a batch size."
    raise UnsupportedStrategyError(expected("data", rule, "a loader with batch_size=None", remedy))
