"""Passes over data that several processes make together, because a model that is in pieces lets them wait."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, distributed

from lightning_unlearn.exceptions import LightningUnlearnError, UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.distributed import everyone

__all__ = ["InStep"]

_END = object()
_NO_BATCH = "no batch"


def _digest(batch: Any) -> str:
    """Of every tensor in a batch: shape, dtype and bytes."""
    digest = hashlib.blake2b(digest_size=16)

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            digest.update(repr((tuple(item.shape), item.dtype)).encode())
            digest.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, Mapping):
            for key, value in item.items():
                digest.update(repr(key).encode())
                add(value)
        elif isinstance(item, list | tuple):
            for value in item:
                add(value)

    add(batch)
    return digest.hexdigest()


class InStep:
    """Has all processes look at the same batches, or raise together; for forward passes that wait for each other.

    A forward pass of a model that is in pieces (FSDP2, tensor parallel) is a collective. A process that raises, or
    whose loader is shorter, would leave the others in it until their time-out; one that has other samples would give
    another result than they. So before each batch the processes tell each other what they have, and a process that
    leaves the block with an error tells them as well. An error that is raised in the middle of a forward pass on some
    processes only cannot be told; with the same batches everywhere it is raised by all.

    Args:
        together: Whether passes are made together; otherwise nothing is exchanged.

    >>> with InStep(False) as passes:
    ...     [batch for batch in passes.batches([1, 2])]
    [1, 2]
    """

    def __init__(self, together: bool) -> None:
        self._together = together and distributed.is_initialized() and distributed.get_world_size() > 1
        self._told = False
        self._failure: Exception | None = None

    @contextmanager
    def part(self) -> Iterator[None]:
        """Around what is done with one model and one batch: an error is raised after the parts of other models."""
        try:
            yield
        except Exception as error:
            if not self._together:
                raise
            self._failure = self._failure or error

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others of an error that they have not raised themselves."""
        # A plain RuntimeError may be that of a collective, behind which nobody listens.
        if self._together and isinstance(error, Exception) and type(error) is not RuntimeError and not self._told:
            self._exchange(None, error)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches, each once all processes have the same.

        Raises:
            UnsupportedStrategyError: on every process: another batch, or none, on one of them.
            LightningUnlearnError: on the others, where one of them has failed.
        """
        if not self._together:
            yield from loader
            return
        iterator = iter(loader)
        while True:
            try:
                batch = next(iterator, _END)
            except Exception as error:
                self._exchange(None, error)
                self._told = True
                raise
            found = self._exchange(_NO_BATCH if batch is _END else _digest(batch), None)
            failed = {rank: text for rank, (_, text) in enumerate(found) if text is not None}
            if failed:
                self._told = True
                rank, text = next(iter(failed.items()))
                rule = "a pass that every process can make"
                raise LightningUnlearnError(expected("data", rule, f"a failure on process {rank}", text))
            if len({digest for digest, _ in found}) > 1:
                self._told = True
                rule = "the same batches on every process, as a model in pieces needs"
                missing = [rank for rank, (digest, _) in enumerate(found) if digest == _NO_BATCH]
                got = f"no more of them on process {missing[0]}" if missing else "different ones"
                remedy = "Give every process a loader over all samples, in the same order: no distributed sampler."
                raise UnsupportedStrategyError(expected("data", rule, got, remedy))
            if batch is _END:
                return
            yield batch
            if self._failure is not None:
                raise self._failure

    @staticmethod
    def _exchange(digest: str | None, error: Exception | None) -> list[tuple[str | None, str | None]]:
        text = None if error is None else f"{type(error).__name__}: {error}"
        return everyone((digest, text), distributed.get_world_size())
