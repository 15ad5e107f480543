"""Runs what changes the disk: at once, or in a short-lived thread beside the training, one change at a time."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

__all__ = ["Publisher"]


_NICE = 15


class Publisher:
    """At most one publication is under way; the next one waits for it. After a failure there is none any more.

    After a failed publication it is unknown how far it went, so nothing may be published behind it: the error is kept
    and raised by every later call. Only the process's next opening of the store finds out what is there.

    Args:
        threaded: Whether publications run in a thread; each has its own, so that none is left when nothing is written.
    """

    def __init__(self, threaded: bool) -> None:
        self._threaded = threaded
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, task: Callable[[], None]) -> None:
        """Run `task`; with a thread this returns once the publication before it has ended.

        Raises:
            BaseException: what this publication raised (without a thread), or what an earlier one did.
        """
        self.wait()
        if not self._threaded:
            self._run(task)
            self.check()
            return
        # Not a daemon: a process that ends in the meantime ends after the publication, not in the middle of it.
        self._thread = threading.Thread(target=self._beside, args=(task,), name="store-publisher")
        self._thread.start()

    def run(self, task: Callable[[], None]) -> None:
        """Run `task` here and now, behind the publication that is under way.

        Raises:
            BaseException: what it raised, or what an earlier publication did.
        """
        self.wait()
        self._run(task)
        self.check()

    def wait(self) -> None:
        """Return once nothing is under way.

        Raises:
            BaseException: what a publication raised.
        """
        self.settle()
        self.check()

    def settle(self) -> None:
        """Return once nothing is under way, whatever came of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raise what a publication raised; does not wait."""
        if self._error is not None:
            raise self._error

    def _beside(self, task: Callable[[], None]) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            # With fewer free cores than threads the training's parallel loops would wait for this one at every end.
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        self._run(task)

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            self._error = error
