"""Being asked before the Trainer writes a checkpoint, whatever is in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.strategies import Strategy

__all__ = ["listen_to_checkpoints"]


def listen_to_checkpoints(strategy: Strategy, before: Callable[[Mapping[str, Any]], None]) -> Callable[[], None]:
    """Have `before` called with every checkpoint that is about to be written, on every rank.

    Callbacks are not asked where only weights are saved, so this is the one place that sees those as well.

    Args:
        strategy: The Trainer's strategy.
        before: Called with the checkpoint's content; what it raises keeps the checkpoint from being written.

    Returns:
        A function that puts everything back as it was; it may be called several times.
    """
    attributes = vars(strategy)
    inner, previous = strategy.save_checkpoint, attributes.get("save_checkpoint")

    def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        before(checkpoint)
        inner(checkpoint, *args, **kwargs)

    def remove() -> None:
        if attributes.get("save_checkpoint") is save_checkpoint:
            if previous is None:
                del attributes["save_checkpoint"]
            else:
                attributes["save_checkpoint"] = previous

    attributes["save_checkpoint"] = save_checkpoint
    return remove
