"""Taking a pass back out of a store: its edit is not in force and its training steps are of no branch that lives."""

from __future__ import annotations

import time
from dataclasses import replace

from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.lineage import Lineage

__all__ = ["withdraw_pass"]

_PATIENCE = 3.0
"""Seconds to wait for a writer that may be another process taking the same pass back."""


def withdraw_pass(store: DeltaStore, *, entry_id: str | None, n_steps: int) -> None:
    """Undo what a pass wrote, where the model it made is not kept.

    The entry stays in the ledger, marked as undone: that somebody tried is part of the record. States that contain the
    edit or later steps are forgotten, and steps from `n_steps` on are dropped. The lineage goes first: steps that
    nothing refers to do no harm if the second half is interrupted, and the next recording drops them. A pass that
    wrote nothing leaves nothing to change.

    All processes of a pass may do this at once, and any of them may be missing: each of them drops the steps of every
    rank that are still there when its turn comes.

    Args:
        store: The store; no writer may be open.
        entry_id: The pass's ledger entry, `None` where nothing was subtracted.
        n_steps: Steps in the store before the pass.

    Raises:
        StoreMismatchError: a writer is open, and stays so for some seconds.
    """

    def without(lineage: Lineage) -> Lineage:
        entry = None if entry_id is None else lineage.entry(entry_id)
        if entry is not None:
            lineage = lineage.with_entry(replace(entry, undone=True))
        states = tuple(
            state
            for state in lineage.states
            if entry_id not in state.edits and all(stop <= n_steps for _, stop in state.ranges)
        )
        runs = tuple(run for run in lineage.runs if run.first < n_steps or run.first == 0)
        return replace(lineage, states=states, runs=runs)

    store.refresh()
    if without(store.lineage) != store.lineage:
        store.update_lineage(without)
    until = time.monotonic() + _PATIENCE
    for rank in range(store.world_size):
        _drop_steps(store, rank, n_steps, until)
    store.refresh()


def _drop_steps(store: DeltaStore, rank: int, n_steps: int, until: float) -> None:
    while True:
        store.refresh()
        if store.reader.commits[rank].n_steps <= n_steps:
            return
        try:
            with store.writer(rank) as writer:
                if writer.n_steps > n_steps:
                    writer.truncate(n_steps)
            return
        except StoreMismatchError:
            if time.monotonic() > until:
                raise
        time.sleep(0.05)
