"""The results of many trainings, read from their folder one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_unlearn.procedures.member_files import MemberFiles
from lightning_unlearn.utilities.checks import expected, shorten

__all__ = ["TrainedMembers"]


@dataclass(frozen=True, slots=True)
class TrainedMembers:
    """What `train_many` trained or found; results are read from the folder when they are asked for, one at a time.

    Attributes:
        folder: Where they are.
        members: What the task was called with.
        keys: Key of every member, in the same order.
        seconds: How long the training of every member took, whenever and wherever that was.
        trained: Keys that this call trained; the others were there.
    """

    folder: str
    members: tuple[Any, ...]
    keys: tuple[str, ...]
    seconds: tuple[float, ...]
    trained: tuple[str, ...]

    def load(self, member: Any) -> Any:
        """The result of one member, on the CPU; of a LightningModule its `state_dict`.

        Raises:
            ValueError: it is not one of the members.
            StoreCorruptedError: its file is damaged.
        """
        if member not in self.members:
            raise ValueError(expected("member", f"one of {shorten(self.members)}", member))
        return MemberFiles(self.folder).load(self.keys[self.members.index(member)])

    def __iter__(self) -> Iterator[Any]:
        """The results in the order of the members; only the current one is held."""
        files = MemberFiles(self.folder)
        return (files.load(key) for key in self.keys)

    def __len__(self) -> int:
        """Number of members."""
        return len(self.members)
