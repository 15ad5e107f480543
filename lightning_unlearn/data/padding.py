"""Which samples of a batch are a process' own, and which are repeated to give all processes the same number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_unlearn.utilities.checks import check_positive_int, expected

__all__ = ["own_samples"]


def own_samples(loader: DataLoader[Any], batch_idx: int, size: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Which samples of a batch count: all but those that the distributed sampler repeats.

    `DistributedSampler`, and so a Trainer that puts one into a loader, gives every process the same number of samples,
    and repeats the first ones for it: with 5 samples and 2 processes one sample is evaluated twice. Loaders have to
    stay even wherever forward passes of the processes wait for each other, so leave those samples out of the metric::

        def test_step(self, batch, batch_idx):
            x, y = batch
            own = own_samples(self.trainer.test_dataloaders, batch_idx, len(y), device=y.device)
            self.metric.update(self(x)[own], y[own], split="test")

    Over all processes every sample of the loader then counts once, whatever the sampler's order. With a sampler or
    batch sampler of any other kind, also one that shares out the data by itself, all samples are a process' own.

    Args:
        loader: The loader that is being iterated, after the Trainer has put its sampler into it.
        batch_idx: Number of the batch in this pass over the loader, from 0.
        size: Number of samples in the batch.
        device: Where the mask is wanted.

    Returns:
        bool of shape (size,).

    Raises:
        ValueError: the loader has no batch size, so the place of a batch is not known, or the batch reaches beyond what
            its sampler draws.

    >>> sampler = DistributedSampler(range(5), num_replicas=2, rank=1, shuffle=False)
    >>> loader = DataLoader(range(5), batch_size=2, sampler=sampler)
    >>> [(batch.tolist(), own_samples(loader, number, len(batch)).tolist()) for number, batch in enumerate(loader)]
    [([1, 3], [True, True]), ([0], [False])]
    """
    check_positive_int("batch_idx", batch_idx, zero=True)
    check_positive_int("size", size, zero=True)
    sampler = loader.sampler
    if not isinstance(sampler, DistributedSampler):
        inner = getattr(loader.batch_sampler, "sampler", None)
        if isinstance(inner, DistributedSampler):
            remedy = "Give the loader a batch size and a sampler, not a batch sampler."
            raise ValueError(expected("loader", "one whose batches have a fixed size", "a batch sampler", remedy))
        return torch.ones(size, dtype=torch.bool, device=device)
    if loader.batch_size is None:
        raise ValueError(expected("loader", "one with a batch size", None))
    start = batch_idx * loader.batch_size
    if start + size > len(sampler):
        rule = f"a batch within the {len(sampler)} samples of this process"
        raise ValueError(expected("batch_idx and size", rule, (batch_idx, size), "Count batches from 0 in each pass."))
    # One order, with its beginning appended to its end, is dealt out in turn: what lies beyond the data is repeated.
    places = torch.arange(start, start + size, device=device) * sampler.num_replicas + sampler.rank
    own: Tensor = places < len(sampler.dataset)  # type: ignore[arg-type]
    return own
