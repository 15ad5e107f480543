"""What any process knows, known to all of them at the end of the same batch, without a wait in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer
from torch.distributed import distributed_c10d

from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.utilities.checks import expected

__all__ = ["BatchAgreement"]

_PATIENCE = 2.0
"""Seconds that a failing process gives the others to hear of it."""


def _first_told(name: str, text: str) -> str | None:
    """The first text that any process has left under this name, this one's if there was none; `None` without an answer.

    It is left where the processes have met, which outlives their connections to each other. Whoever keeps it may be
    gone as well, hence the bound on the time.
    """
    found: list[str] = []

    def ask() -> None:
        with suppress(RuntimeError, ValueError):
            store = distributed_c10d._get_default_store()
            found.append(store.compare_set(name, "", text).decode())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return found[0] if found else None


class BatchAgreement:
    """The largest value of each flag over all processes; made by `BatchAgreement.of`.

    Each process calls `begin` and `end` once a batch, and `now` at the same places as the others. One process alone
    agrees with itself.

    Args:
        group: A gloo group of all processes, used by nothing else; `None` for one process.
        rank: This process's place in it.
        n_flags: Number of flags.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, n_flags: int) -> None:
        self._group = group
        self._rank = rank
        self._n_flags = n_flags
        self._work: Any = None
        self._flags = torch.zeros(n_flags + 1, dtype=torch.int64)
        self._told = False

    @classmethod
    def of(cls, trainer: Trainer, n_flags: int) -> BatchAgreement:
        """Meet the other processes of the Trainer; collective."""
        if trainer.world_size == 1:
            return cls(None, 0, n_flags)
        # Annotated as if this process could be left out of a group of all.
        group: Any = dist.new_group(backend="gloo", timeout=getattr(trainer.strategy, "_timeout", None))
        return cls(group, trainer.global_rank, n_flags)

    def begin(self, flags: Sequence[int]) -> None:
        """A batch begins: tell the others, and do not wait for them."""
        if self._group is not None:
            self._settle()  # of a batch that did not come to its end
            self._start(flags, failed=0)

    def end(self, flags: Sequence[int]) -> tuple[int, ...]:
        """The batch ends: what was told at its beginning, or with one process what is known now.

        Raises:
            LightningUnlearnError: another process has failed.
        """
        if self._group is None:
            return tuple(flags)
        return self._settle() or (0,) * self._n_flags

    def now(self, flags: Sequence[int]) -> tuple[int, ...]:
        """What is known now; waits for the others.

        Raises:
            LightningUnlearnError: another process has failed.
        """
        self.begin(flags)
        return self.end(flags)

    def fail(self, error: BaseException) -> str | None:
        """Tell the others that this process has failed, as far as they are there to hear it; waits for seconds at most.

        Args:
            error: What it has failed with.

        Returns:
            Which process has failed before with another error, and with what; `None` where that is not known.
        """
        if self._group is None:
            return None
        name, own = f"lightning_unlearn/failed/{self._group.group_name}", repr(error)[:500]
        first = _first_told(name, f"{self._rank}: {own}")
        if not self._told and self._work is not None:
            self._wait_a_little()
            self._told = self._work.is_completed() and bool(self._flags[-1])
        if not self._told:
            with suppress(RuntimeError):  # nobody is there any more
                self._start((0,) * self._n_flags, failed=self._rank + 1, timeout=timedelta(seconds=_PATIENCE))
                self._wait_a_little()
        self.close()
        rank, _, message = (first or "").partition(": ")
        return f"Process {rank} failed first: {message}" if message and message != own else None

    def close(self) -> None:
        """Leave the group, unless it is still at work for somebody who may never answer."""
        group, self._group = self._group, None
        if group is not None and (self._work is None or self._work.is_completed()):
            dist.destroy_process_group(group)
        self._work = None

    def _start(self, flags: Sequence[int], *, failed: int, timeout: timedelta | None = None) -> None:
        if self._group is None:
            return
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        if timeout is not None:
            options.timeout = timeout
        self._flags = torch.tensor([*flags, failed], dtype=torch.int64)
        self._work = self._group.allreduce([self._flags], options)

    def _settle(self) -> tuple[int, ...] | None:
        work, self._work = self._work, None
        if work is None:
            return None
        work.wait()
        *agreed, failed = self._flags.tolist()
        if failed:
            self._told = True
            rule, got = "under way in every process", f"process {failed - 1} that has failed"
            remedy = "Its own error says why; start the training again from its last checkpoint."
            raise LightningUnlearnError(expected("training", rule, got, remedy))
        return tuple(agreed)

    def _wait_a_little(self) -> None:
        until = time.monotonic() + _PATIENCE
        while not self._work.is_completed() and time.monotonic() < until:
            time.sleep(0.005)
