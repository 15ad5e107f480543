"""Small helpers for code that runs on several ranks at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only

from lightning_unlearn.exceptions import LightningUnlearnError

__all__ = [
    "everyone",
    "gather",
    "on_every_process",
    "on_every_rank",
    "on_first_process",
    "on_rank_zero",
    "process_rank",
    "share_out",
]

T = TypeVar("T")


def share_out(sizes: Sequence[int], n_ranks: int, candidates: Sequence[Sequence[int]] | None = None) -> tuple[int, ...]:
    """Assign pieces of work to ranks: the largest first, each to the rank that has the least so far.

    Every rank computes the same assignment by itself. No rank gets more than its fair share plus the largest piece.

    Args:
        sizes: Size of each piece, such as the entries of each layer.
        n_ranks: Number of ranks, at least one.
        candidates: For each piece the ranks that can take it; all of them unless given.

    Returns:
        The rank of each piece.

    >>> share_out([10, 3, 4, 3], 2)
    (0, 1, 1, 1)
    >>> share_out([10, 3, 4, 3], 2, [(0, 1), (0,), (0, 1), (0, 1)])
    (0, 0, 1, 1)
    """
    loads = [0] * n_ranks
    owners = [0] * len(sizes)
    for piece in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        able = range(n_ranks) if candidates is None else candidates[piece]
        owners[piece] = min(able, key=lambda rank: (loads[rank], rank))
        loads[owners[piece]] += sizes[piece]
    return tuple(owners)


def process_rank() -> int:
    """Rank of this process as Lightning knows it, also outside a fit; 0 where there is only one.

    >>> process_rank()
    0
    """
    return int(getattr(rank_zero_only, "rank", 0))


def on_rank_zero(strategy: Strategy, function: Callable[[], T]) -> T:
    """Run `function` on rank 0 only and return its result, which must be picklable, on every rank.

    A failure is raised on every rank, so that none of them waits for a rank that is gone.

    Raises:
        LightningUnlearnError: on the other ranks, where rank 0 failed with an error of another kind.
    """
    result: T | None = None
    failure: LightningUnlearnError | None = None
    if strategy.is_global_zero:
        try:
            result = function()
        except LightningUnlearnError as error:
            failure = error
        except Exception as error:
            strategy.broadcast((None, LightningUnlearnError(f"Rank 0 failed: {error!r}")))
            raise
    result, failure = strategy.broadcast((result, failure))
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def gather(strategy: Strategy, value: T) -> list[T]:
    """The values of all ranks, which must be picklable, in the order of the ranks, on every rank."""
    return everyone(value, _world_size(strategy))


def on_every_rank(strategy: Strategy, function: Callable[[], T]) -> T:
    """Run `function` on every rank and return its own result to each.

    Where one fails, all raise what the first of them failed with, so that none of them waits for a rank that is gone.

    Raises:
        LightningUnlearnError: on the other ranks, where the first failed with an error of another kind.
    """
    return _agreed(function, process_rank(), _world_size(strategy))


def on_first_process(function: Callable[[], T]) -> T:
    """`on_rank_zero` without a strategy: over the process group as it is, and at once where there is none.

    >>> on_first_process(lambda: 3)
    3
    """
    if not dist.is_initialized():
        return function()
    found: list[tuple[T | None, LightningUnlearnError | None]] = [(None, None)]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            found = [(function(), None)]
        except LightningUnlearnError as error:
            found, failure = [(None, error)], error
        except Exception as error:
            found, failure = [(None, LightningUnlearnError(f"Rank 0 failed: {error!r}"))], error
    dist.broadcast_object_list(found, src=0)
    if failure is not None:
        raise failure
    result, theirs = found[0]
    if theirs is not None:
        raise theirs
    return result  # type: ignore[return-value]


def on_every_process(function: Callable[[], T]) -> T:
    """`on_every_rank` without a strategy: over the process group as it is, and at once where there is none.

    >>> on_every_process(lambda: 3)
    3
    """
    together = dist.is_initialized()
    return _agreed(function, dist.get_rank() if together else 0, dist.get_world_size() if together else 1)


def _world_size(strategy: Strategy) -> int:
    return int(getattr(strategy, "world_size", 1))


def everyone(value: T, count: int) -> list[T]:
    """`gather` without a strategy: the values of all `count` processes, in the order of their ranks.

    >>> everyone(5, 1)
    [5]
    """
    values: list[Any] = [value] * count
    if count > 1:
        dist.all_gather_object(values, value)
    return values


def _agreed(function: Callable[[], T], rank: int, count: int) -> T:
    result: T | None = None
    failure: Exception | None = None
    try:
        result = function()
    except Exception as error:  # raised below, once the others know
        failure = error
    told = failure
    if failure is not None and not isinstance(failure, LightningUnlearnError):
        told = LightningUnlearnError(f"Rank {rank} failed: {failure!r}")
    first = next(((other, error) for other, error in enumerate(everyone(told, count)) if error is not None), None)
    if first is None:
        return result  # type: ignore[return-value]
    if failure is not None and first[0] == rank:
        raise failure
    raise first[1] from failure
