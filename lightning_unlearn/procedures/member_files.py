"""Where the results of many trainings are kept: one file each, that is there wholly or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors
from filelock import FileLock, Timeout
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.documents import from_document, to_document
from lightning_unlearn.store.segment import read_header
from lightning_unlearn.store.state_tree import flatten_state, unflatten_state, without_shared_memory
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.file_views import DAMAGE, Raw
from lightning_unlearn.utilities.files import TEMPORARY_PREFIX, Files
from lightning_unlearn.utilities.parameters import tensors_digest

__all__ = ["MemberFiles"]

_KIND = "member"
_FILE = re.compile(r"([0-9a-f]{32})\.safetensors")


class MemberFiles:
    """The results in one folder, by key; any number of processes may use it at once.

    A result is one safetensors file: its tensors, and in the metadata a document with everything else, which also
    says what the tensors' digest is. Whoever publishes a key first wins; what is there is never replaced.

    Args:
        url: A local path or an fsspec URL.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self._files = Files(url)
        self.url = self._files.url

    def keys(self) -> set[str]:
        """Keys of the results that are there."""
        return {found[1] for name in self._files.names() if (found := _FILE.fullmatch(name))}

    def has(self, key: str) -> bool:
        """Whether the result of a key is there."""
        return self._files.exists(_name(key))

    def save(self, key: str, about: Mapping[str, Any], result: object) -> None:
        """Publish a result, unless another process did so before.

        Raises:
            TypeError: the result is not made of tensors, numbers, strings and collections.
        """
        tensors: dict[str, Tensor] = {}
        tree = flatten_state(result, "result", tensors)
        body = {**about, "key": key, "result": tree, "tensors": tensors_digest(tensors)}
        data = save_tensors(without_shared_memory(tensors), {"document": to_document(_KIND, body).decode()})
        with contextlib.suppress(FileExistsError):
            self._files.publish(_name(key), data, exclusive=True)

    def about(self, key: str) -> dict[str, Any]:
        """What was said of a result when it was saved; its tensors are not read.

        Raises:
            StoreCorruptedError: the file is damaged.
        """
        with self._damage_named(key):
            view = self._files.view(_name(key))
            length = int.from_bytes(view.read(0, 8), "little")
            return _document(key, view.read(0, 8 + length))

    def load(self, key: str) -> Any:
        """A result, its tensors on the CPU.

        Raises:
            StoreCorruptedError: the file is damaged.
        """
        with self._damage_named(key):
            data = self._files.read(_name(key))
            body, tensors = _document(key, data), load_tensors(data)
            if tensors_digest(tensors) != body["tensors"]:
                raise ValueError("tensors that do not fit their digest")
            return unflatten_state(body["result"], tensors)

    @contextlib.contextmanager
    def claim(self, key: str, *, wait: bool) -> Iterator[bool]:
        """Whether this process alone may produce the result of a key, until the end of the block or of the process.

        On a local disk, locks see to that; elsewhere everybody may, and the first result counts.

        Args:
            key: The key.
            wait: Wait for a process that has the claim, instead of going without.
        """
        if not self._files.is_local:
            yield True
            return
        lock = FileLock(self._files.path(f".{key}.lock"), timeout=-1 if wait else 0, thread_local=False)
        with contextlib.suppress(Timeout):
            lock.acquire()
        try:
            if lock.is_locked:
                self._sweep(key)
            yield lock.is_locked
            if lock.is_locked and self.has(key):
                # Nobody needs the claim on a result that is there, also who waits for this lock or makes a new one.
                self._files.delete(f".{key}.lock")
        finally:
            lock.release()

    def _sweep(self, key: str) -> None:
        """Remove what a killed process left of its attempt to publish a key."""
        for name in self._files.names():
            if name.startswith(f"{TEMPORARY_PREFIX}{_name(key)}-"):
                self._files.delete(name)

    @contextlib.contextmanager
    def _damage_named(self, key: str) -> Iterator[None]:
        try:
            yield
        except StoreMismatchError:  # intact, but of a newer release
            raise
        except (StoreCorruptedError, *DAMAGE, LookupError, TypeError, safetensors.SafetensorError) as error:
            name, remedy = self._files.path(_name(key)), "Delete the file, and train the member again."
            raise StoreCorruptedError(expected(name, "an intact result", repr(error), remedy)) from error


def _document(key: str, data: Raw) -> dict[str, Any]:
    return from_document(_KIND, _name(key), str(read_header(data)[0]["__metadata__"]["document"]).encode())


def _name(key: str) -> str:
    return f"{key}.safetensors"
