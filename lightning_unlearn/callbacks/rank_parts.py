"""Opening a store on every rank: one place that all of them see, or a part of it on each node."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from lightning import Trainer
from lightning.pytorch.strategies import Strategy

from lightning_unlearn.callbacks.recording_checks import NEW_STORE
from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.documents import digest_of
from lightning_unlearn.store.joined_writer import JoinedWriter
from lightning_unlearn.store.joining import record_checksums
from lightning_unlearn.store.parts import open_here
from lightning_unlearn.store.writer import Background, StoreWriter
from lightning_unlearn.types import LayerPiece
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.distributed import gather, on_every_rank, on_rank_zero

__all__ = ["RankParts", "open_parts"]

_JOINED = "Start the ranks on the nodes that have their parts, or join the parts and record into the joined store."


@dataclass(frozen=True, slots=True)
class RankParts:
    """What a rank opened, and which ranks write to another place than rank 0.

    Attributes:
        store: The store, or this node's part of it.
        writer: This rank's writer.
        elsewhere: Ranks whose steps rank 0 cannot see, because they write to a part on their own node; the same on
            every rank, and empty where all ranks see one place.
    """

    store: DeltaStore
    writer: StoreWriter | JoinedWriter
    elsewhere: tuple[int, ...]

    def truncate_copies(self, n_steps: int) -> None:
        """For rank 0: drop what was joined of other nodes' steps from `n_steps` on, as their parts will do.

        Otherwise a branch of the training that no weights continue would stay in the store beside the new steps.
        """
        for rank in self.elsewhere:
            if self.store.here.commits[rank].n_steps > n_steps:
                writer = self.store.writer(rank)
                try:
                    writer.truncate(n_steps)
                finally:
                    writer.abandon()


def open_parts(
    trainer: Trainer,
    url: str | os.PathLike[str],
    n_steps: int,
    *,
    size_budget: int | None,
    background: Background,
    pieces: Sequence[LayerPiece] = (),
) -> RankParts:
    """Open the store that rank 0 has made or found at `url`, and a writer, on every rank; collective.

    Whether ranks see the same place is found out: a rank that does not find rank 0's store at its own `url` writes to
    a part there, which is made where the recording begins.

    Args:
        trainer: The Trainer that is about to train.
        url: Where the store is; the same on every rank.
        n_steps: How many recorded steps come before those of the run.
        size_budget: Bound on the bytes of deltas of this rank.
        background: What threads do, see `StoreWriter`.
        pieces: The store's list of pieces, which a part of it does not have.

    Raises:
        StoreMismatchError: on every rank, where one of them finds something else at `url`, or too few steps.
    """
    strategy, rank = trainer.strategy, trainer.global_rank
    body = on_rank_zero(strategy, lambda: dict(DeltaStore.open(url).body))
    opened: list[StoreWriter | JoinedWriter] = []

    def open_one() -> DeltaStore:
        store = open_here(url, body, rank, begins=n_steps == 0)
        if not store.is_part:
            store.refresh()
        if trainer.world_size == 1 < store.world_size:
            opened.append(JoinedWriter(store, size_budget=size_budget, background=background))
        else:
            opened.append(store.writer(rank, size_budget=size_budget, background=background, pieces=pieces))
        return store

    try:
        store = on_every_rank(strategy, open_one)
        writer = opened[0]
        elsewhere = tuple(other for other, is_part in enumerate(gather(strategy, store.is_part)) if is_part)
        _check_steps(gather(strategy, writer.n_steps), n_steps, parted=bool(elsewhere))
        if elsewhere:
            _check_copies(strategy, store, rank, elsewhere, n_steps)
    except BaseException:
        for one in opened:
            one.abandon()
        raise
    return RankParts(store, writer, elsewhere)


def _check_steps(found: list[int], n_steps: int, *, parted: bool) -> None:
    """Decided together, so that no rank waits for one that has given up."""
    lacking = next((rank for rank, steps in enumerate(found) if steps < n_steps), None)
    if lacking is not None:
        rule = f"a store in which every rank has {n_steps} steps"
        got = f"{found[lacking]} of rank {lacking}"
        raise StoreMismatchError(expected("store", rule, got, _JOINED if parted else NEW_STORE))


def _check_copies(strategy: Strategy, store: DeltaStore, rank: int, elsewhere: tuple[int, ...], n_steps: int) -> None:
    """Where parts were joined already, they must not have gone another way since: a purge, for one, spares parts."""

    def checksum(other: int) -> str:
        known = record_checksums(store.files, store.store_id, store.here.commits[other], other)
        return digest_of(known[:n_steps].tobytes())

    own = gather(strategy, on_every_rank(strategy, lambda: checksum(rank) if store.is_part else ""))

    def compare() -> None:
        for other in elsewhere:
            joined = store.here.commits[other].n_steps
            if joined >= n_steps > 0 and checksum(other) != own[other]:
                rule, got = "one with the steps that were joined", f"another one (of rank {other})"
                raise StoreMismatchError(expected("part", rule, got, "Record into the joined store."))

    on_rank_zero(strategy, compare)
