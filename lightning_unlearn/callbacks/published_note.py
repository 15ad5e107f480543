"""What to do with a recording that an error has ended, in words that go with the error."""

from __future__ import annotations

from lightning_unlearn.store.delta_store import DeltaStore

__all__ = ["published_note"]


def published_note(store: DeltaStore, rank: int, world_size: int, checkpointed: int | None) -> str:
    """What of a recording is safe after an error, and how to go on; looks at the files and waits for nobody.

    Args:
        store: The store that was recorded into.
        rank: This process's rank.
        world_size: Number of processes.
        checkpointed: Steps in the newest checkpoint, `None` where there is none.
    """
    store.refresh()
    text = f"DeltaRecorder: {store.n_steps} steps are published in {store.url!r}. "
    if checkpointed is None:
        text += "No checkpoint was saved yet: start the training again, from its beginning."
    else:
        text += (
            f"Go on with `fit(ckpt_path=...)` from the newest checkpoint, which was saved after {checkpointed} steps, "
            "or from an older one: steps behind it are dropped and recorded again."
        )
    if world_size == 1:
        return text
    own = store.reader.commits[rank].n_steps if rank < len(store.reader.commits) else store.n_steps
    return (
        f"{text} This is process {rank} of {world_size}, and has published {own} steps. If the error is about a "
        "connection or a time-out, another process has ended or hangs, and its output says why. How long the others "
        "wait for one that hangs is set by `DDPStrategy(timeout=...)`."
    )
