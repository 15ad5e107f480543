"""Small helpers for code that runs on several ranks at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

from lightning_unlearn.exceptions import LightningUnlearnError

__all__ = ["on_every_process", "on_first_process", "on_rank_zero", "process_rank", "share_out"]

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


def on_first_process(function: Callable[[], T]) -> T:
    """`on_rank_zero` without a strategy: over the process group as it is, and at once where there is none.

    >>> on_first_process(lambda: 3)
    3
    """
    if not distributed.is_initialized():
        return function()
    found: list[tuple[T | None, LightningUnlearnError | None]] = [(None, None)]
    failure: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            found = [(function(), None)]
        except LightningUnlearnError as error:
            found, failure = [(None, error)], error
        except Exception as error:
            found, failure = [(None, LightningUnlearnError(f"Rank 0 failed: {error!r}"))], error
    distributed.broadcast_object_list(found, src=0)
    if failure is not None:
        raise failure
    result, theirs = found[0]
    if theirs is not None:
        raise theirs
    return result  # type: ignore[return-value]


def on_every_process(function: Callable[[], T]) -> T:
    """Run `function` on every process, and return each one's result if it went well on all of them.

    So a check that one process fails stops all of them, and none waits for one that is gone.

    Raises:
        LightningUnlearnError: on processes where it went well, if another one failed; that one raises its own error.

    >>> on_every_process(lambda: 3)
    3
    """
    if not distributed.is_initialized():
        return function()
    failure: Exception | None = None
    try:
        result = function()
    except Exception as error:
        failure = error
    failures: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(failures, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    others = [f"process {rank} failed: {text}" for rank, text in enumerate(failures) if text is not None]
    if others:
        raise LightningUnlearnError(f"Expected all processes to get on, but {'; '.join(others)}")
    return result
