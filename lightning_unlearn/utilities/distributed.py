"""Small helpers for code that runs on several ranks at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only

from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.utilities.checks import expected

__all__ = ["on_every_rank", "on_rank_zero", "process_rank", "share_out"]

T = TypeVar("T")


def share_out(sizes: Sequence[int], n_ranks: int) -> tuple[int, ...]:
    """Assign pieces of work to ranks: the largest first, each to the rank that has the least so far.

    Every rank computes the same assignment by itself. No rank gets more than its fair share plus the largest piece.

    Args:
        sizes: Size of each piece, such as the entries of each layer.
        n_ranks: Number of ranks, at least one.

    Returns:
        The rank of each piece.

    >>> share_out([10, 3, 4, 3], 2)
    (0, 1, 1, 1)
    """
    loads = [0] * n_ranks
    owners = [0] * len(sizes)
    for piece in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        owners[piece] = min(range(n_ranks), key=lambda rank: (loads[rank], rank))
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


def on_every_rank(strategy: Strategy, function: Callable[[], T], *, name: str, rule: str) -> T:
    """Run `function` on every rank and return its result, or fail on every rank where it fails on one.

    So nobody waits for a rank that has given up.

    Args:
        strategy: The Trainer's strategy.
        function: What to run; it must not talk to other ranks.
        name: What the error on the other ranks is about.
        rule: What it was expected to be.

    Raises:
        LightningUnlearnError: on the ranks where it succeeded, if it failed on another.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = function()
    except Exception as error:  # raised below, once the others know
        failure = error
    failed = strategy.reduce_boolean_decision(failure is not None, all=False)
    if failure is not None:
        raise failure
    if failed:
        raise LightningUnlearnError(expected(name, rule, "another rank that could not", "Its own error says why."))
    return result  # type: ignore[return-value]
