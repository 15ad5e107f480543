"""Many trainings of one kind, such as the retrained models that metrics of distributions need: fanned out, and kept."""

from __future__ import annotations

import functools
import inspect
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from lightning import LightningModule
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_unlearn.exceptions import MissingRequirementError, TrainingFailedError
from lightning_unlearn.procedures.member_files import MemberFiles
from lightning_unlearn.procedures.trained_members import TrainedMembers
from lightning_unlearn.procedures.worker_pool import worker_pool
from lightning_unlearn.store.documents import digest_of
from lightning_unlearn.utilities.checks import check_positive_int, expected, shorten
from lightning_unlearn.utilities.modes import isolated_rng

__all__ = ["MemberTask", "train_many"]

MemberTask: TypeAlias = Callable[[Any], Any]
"""member -> a LightningModule, or what `load` shall give: tensors, numbers and strings, in dictionaries and lists."""

_Fate: TypeAlias = Literal["trained", "found", "elsewhere"]


def train_many(
    task: MemberTask,
    members: Iterable[Any],
    *,
    folder: str | os.PathLike[str],
    name: str | None = None,
    version: str = "1",
    executor: Executor | None = None,
    workers: int | None = None,
    stop_on_error: bool = False,
    progress: bool = True,
) -> TrainedMembers:
    """Call `task(member)` for every member, in parallel, and keep what it returns in a folder.

    A result is found again by its key, a digest of the task's name, its arguments (those bound by `functools.partial`,
    and the member) and `version`. The code of the task, and files that it reads, are not part of it: **change `version`
    when they change**. So the same call resumes a run that was killed, repeats no finished member, and a longer list of
    members trains only what is new.

    Workers write their results themselves, each wholly or not at all, so none that is finished is lost with the
    process that waits for it. Two runs on one folder share the work: on a local disk a member is claimed by a lock that
    ends with its process, elsewhere the first result counts.

    Before each call the global generators of Python, NumPy and torch are seeded from the key, so that a result depends
    neither on the worker nor on what it did before; in the caller's process they are restored. Threads share those
    generators: with a pool of threads, tasks that draw from them are not repeatable.

    Guarantee: what is in the folder is what single calls of the task, so seeded, return; as far as the task itself is
    deterministic.

    Args:
        task: A function that can be pickled (one of a module, not a lambda), or a `functools.partial` of one with
            arguments of plain data. Returns a LightningModule, whose `state_dict` is kept, or any collection of
            tensors, numbers and strings.
        members: Different values of plain data (as JSON has it), such as seeds.
        folder: A local path, or an fsspec URL that all workers reach.
        name: Of the task in keys; by default its module and qualified name.
        version: Of the task's code and data.
        executor: Whose `submit` is used, such as that of Dask or mpi4py on a cluster; it is not shut down. By default
            processes that are spawned for this call, with equal shares of the cores as threads of torch; they end with
            the caller, also when it is killed. A script needs the usual `if __name__ == "__main__"` then.
        workers: How many of these processes; by default one a core.
        stop_on_error: Raise at the first error, and begin no further member. By default the others are finished first.
        progress: Show a bar on standard error.

    Raises:
        ValueError: members or arguments are no plain data, or a member is given twice; both `executor` and `workers`.
        MissingRequirementError: a task without a name of its own; or results are not in the folder afterwards, which
            workers on another machine may not reach.
        TrainingFailedError: members failed; names them and their keys, and is raised from the first of their errors.
        StoreCorruptedError: a file in the folder is damaged.

    >>> import torch
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> def task(seed):
    ...     return {"weight": torch.full((2,), float(seed))}
    >>> with ThreadPoolExecutor(1) as pool:
    ...     runs = train_many(
    ...         task, range(3), folder="memory://doc-many", name="doc", executor=pool, progress=False
    ...     )
    >>> runs.load(2), sum(one["weight"].sum().item() for one in runs)
    ({'weight': tensor([2., 2.])}, 6.0)
    """
    members = tuple(members)
    if executor is not None and workers is not None:
        raise ValueError(expected("executor or workers", "given, at most one of the two", (executor, workers)))
    workers = check_positive_int("workers", os.cpu_count() or 1 if workers is None else workers)
    about = {**_described(task, name), "version": version}
    keys = tuple(_key(about, member) for member in members)
    if len(set(keys)) < len(keys):
        twice = [member for place, member in enumerate(members) if keys[place] in keys[:place]]
        raise ValueError(expected("members", "different values", shorten(twice)))
    files = MemberFiles(folder)
    there = files.keys()
    missing = {key: member for key, member in zip(keys, members, strict=True) if key not in there}
    trained: list[str] = []
    if missing:
        count = min(workers, len(missing))
        bar = _bar(about["task"], len(keys), len(missing), shown=progress)
        with bar as advance, worker_pool(executor, count) as pool:
            trained = _run(pool, task, missing, files.url, about, advance, stop_on_error=stop_on_error)
    lost = [key for key in missing if not files.has(key)]
    if lost:
        rule, remedy = "one that all workers reach", "Give a shared path, or the URL of an object store."
        raise MissingRequirementError(expected("folder", rule, f"{files.url}, without {shorten(lost)}", remedy))
    seconds = tuple(float(files.about(key)["seconds"]) for key in keys)
    return TrainedMembers(files.url, members, keys, seconds, tuple(key for key in keys if key in trained))


def _described(task: MemberTask, name: str | None) -> dict[str, Any]:
    """The task's name and what is bound to it."""
    bound = task if isinstance(task, functools.partial) else functools.partial(task)
    if name is None:
        if not inspect.isfunction(bound.func) or "<" in bound.func.__qualname__:
            rule, remedy = "a function of a module", "Give it a `name` that no other task in the folder has."
            raise MissingRequirementError(expected("task", rule, bound.func, remedy))
        module = bound.func.__module__
        if module == "__main__":  # what the same function of this script is called wherever it is imported
            module = Path(str(getattr(sys.modules["__main__"], "__file__", module))).stem
        name = f"{module}.{bound.func.__qualname__}"
    return {"task": name, "arguments": [list(bound.args), dict(bound.keywords)]}


def _key(about: Mapping[str, Any], member: Any) -> str:
    try:
        text = json.dumps([about, member], sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        rule, remedy = "plain data, as JSON has it", "Make everything else inside the task."
        got = f"{member!r} with {about['arguments']!r} ({error})"
        raise ValueError(expected("members and arguments of the task", rule, got, remedy)) from error
    return digest_of(text.encode())


def _train(task: MemberTask, member: Any, key: str, url: str, about: Mapping[str, Any], wait: bool) -> _Fate:
    """Run in a worker: one member, unless it is there or another process is at it."""
    files = MemberFiles(url)
    with files.claim(key, wait=wait) as claimed:
        if files.has(key):
            return "found"
        if not claimed:
            return "elsewhere"
        seed = int(key[:8], 16)
        started = time.perf_counter()
        with isolated_rng(seed):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            result = task(member)
        about = {**about, "member": member, "seconds": time.perf_counter() - started}
        files.save(key, about, result.state_dict() if isinstance(result, LightningModule) else result)
    return "trained"


def _run(
    pool: Executor,
    task: MemberTask,
    missing: Mapping[str, Any],
    url: str,
    about: Mapping[str, Any],
    advance: Callable[[], None],
    *,
    stop_on_error: bool,
) -> list[str]:
    """Train what is missing and return the keys of what was trained here."""
    trained: list[str] = []
    failures: dict[str, BaseException] = {}
    left = list(missing)
    # Members that another run is at come last, and are waited for: it may fail, or be killed.
    for wait in (False, True):
        futures = {_submit(pool, task, missing[key], key, url, about, wait): key for key in left}
        left = []
        try:
            for future in as_completed(futures):
                key, error = futures[future], future.exception()
                if error is not None:
                    failures[key] = error
                    if stop_on_error:
                        raise _failed(missing, failures)
                elif future.result() == "elsewhere":
                    left.append(key)
                    continue
                elif future.result() == "trained":
                    trained.append(key)
                advance()
        finally:
            for future in futures:
                future.cancel()
    if failures:
        raise _failed(missing, failures)
    return trained


def _submit(pool: Executor, *call: Any) -> Future[_Fate]:
    try:
        return pool.submit(_train, *call)
    except BrokenExecutor as error:  # a worker is gone already; what other members did is still to be reported
        failed: Future[_Fate] = Future()
        failed.set_exception(error)
        return failed


def _failed(missing: Mapping[str, Any], failures: Mapping[str, BaseException]) -> TrainingFailedError:
    failures = {key: failures[key] for key in missing if key in failures}
    told = [f"member {missing[key]!r} (key {key}): {error!r}" for key, error in list(failures.items())[:5]]
    if len(failures) > len(told):
        told.append(f"{len(failures) - len(told)} more")
    got = f"{len(failures)} that failed: {'; '.join(told)}"
    remedy = "Call again for these; finished members are kept."
    failed = TrainingFailedError(expected("members", "trained without an error", got, remedy), failures)
    failed.__cause__ = next(iter(failures.values()))  # with the traceback of the worker
    return failed


@contextmanager
def _bar(name: str, total: int, missing: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        line = progress.add_task(name, total=total, completed=total - missing)
        yield lambda: progress.advance(line)
