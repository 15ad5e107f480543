"""Where trials are kept: Optuna's journal in a file, with locks that end with the process that holds them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_unlearn.tuning.optional import load_optuna

__all__ = ["TrialJournal"]


class _AppendLock:
    """What Optuna takes before it appends. A line that a killed process left half-written is cut off first.

    Without that, the next line would be joined to it, and the journal could not be read any more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(f"{path}.append.lock", thread_local=False)

    def acquire(self) -> bool:
        self._lock.acquire()
        _drop_torn_line(self._path)
        return True

    def release(self) -> None:
        self._lock.release()


def _drop_torn_line(path: Path) -> None:
    """Cut a file behind its last line break."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if not end:
            return
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


class TrialJournal:
    """The journal of a study, and who is at which trial.

    Several processes, on one machine or on several that share the directory, may have one open. A process that is
    killed leaves a journal that opens, and its locks are free.

    Args:
        path: The file; its directory is made. Locks lie beside it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._deciding = FileLock(f"{self.path}.lock", thread_local=False)

    def storage(self) -> Any:
        """Optuna's storage on this file."""
        journal = load_optuna().storages.journal
        return load_optuna().storages.JournalStorage(
            journal.JournalFileBackend(str(self.path), lock_obj=_AppendLock(self.path))
        )

    @contextlib.contextmanager
    def deciding(self) -> Iterator[None]:
        """Whoever decides what is tried next does it alone."""
        with self._deciding:
            yield

    def claim(self, trial: int) -> FileLock | None:
        """The lock of a trial, acquired; `None` where a living process has it."""
        lock = FileLock(f"{self.path}.trial-{trial}.lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def release(self, trial: int, lock: FileLock) -> None:
        """Give a claim back, once the trial is told; nobody asks for it again."""
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
