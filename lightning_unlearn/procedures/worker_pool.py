"""Processes to train in, where the user has none."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager

import torch

__all__ = ["worker_pool"]


@contextmanager
def worker_pool(executor: Executor | None, workers: int) -> Iterator[Executor]:
    """The user's executor as it is, or processes that end with the block, and with this process.

    Args:
        executor: The user's.
        workers: How many processes otherwise; each has an equal share of the cores as torch's threads.
    """
    if executor is not None:
        yield executor
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Spawned, not forked: torch may have started threads or a device here, which no child can go on with.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(threads,))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # what is running saves its result by itself
        raise
    pool.shutdown()


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End when the parent does: a worker of a pool whose parent is killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
