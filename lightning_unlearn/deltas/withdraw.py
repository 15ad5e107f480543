"""Taking a pass back out of a store: its edit is not in force and its training steps are of no branch that lives."""

from __future__ import annotations

from dataclasses import replace

from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.lineage import Lineage

__all__ = ["withdraw_pass"]


def withdraw_pass(store: DeltaStore, *, entry_id: str | None, n_steps: int) -> None:
    """Undo what a pass wrote, where the model it made is not kept.

    The entry stays in the ledger, marked as undone: that somebody tried is part of the record. States that contain the
    edit or later steps are forgotten, and steps from `n_steps` on are dropped. The lineage goes first: steps that
    nothing refers to do no harm if the second half is interrupted, and the next recording drops them. A pass that
    wrote nothing leaves nothing to change.

    Args:
        store: The store; no writer may be open.
        entry_id: The pass's ledger entry, `None` where nothing was subtracted.
        n_steps: Steps in the store before the pass.

    Raises:
        StoreMismatchError: a writer is open.
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
    for rank, commit in enumerate(store.reader.commits):
        if commit.n_steps > n_steps:
            with store.writer(rank) as writer:
                writer.truncate(n_steps)
    store.refresh()
