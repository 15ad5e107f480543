"""Parts of one immutable file: straight from the page cache where it is local, by range reads elsewhere."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import Protocol, TypeAlias

__all__ = ["DAMAGE", "FileView", "MappedFile", "RangedFile", "Raw", "too_short"]

Raw: TypeAlias = bytes | memoryview
"""Bytes that may lie in a mapped file; read-only."""

DAMAGE = (ValueError, EOFError, FileNotFoundError)
"""What reading raises where content is wrong, cut or gone. Any other `OSError` is no damage: too many files are open, a
disk is out of reach, and what may be intact must not be called broken."""


class FileView(Protocol):
    """A file of which parts can be read; it may be gone from its directory meanwhile, but its content never changes."""

    def read(self, start: int, stop: int) -> Raw:
        """Bytes `start` to `stop`, all of them.

        Raises:
            EOFError: the file is shorter than that.
            OSError: it cannot be read now.
        """
        ...


def too_short(name: str, start: int, stop: int, size: int) -> EOFError:
    """The error for bytes that a file does not have."""
    return EOFError(f"bytes {start} to {stop} of `{name}`, which has {size}")


class MappedFile:
    """A local file, mapped read-only: what is read is not copied, and stays valid as long as it is referred to.

    The length is looked up at every read, so a file that was cut short is an error and not a crash of the process.

    Args:
        path: Path of a local file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be opened now, for example because too many files are open.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        with open(path, "rb") as stream:
            # an empty file cannot be mapped
            empty = os.fstat(stream.fileno()).st_size == 0
            try:
                self._map = None if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:  # which does not say of which file
                raise OSError(error.errno, error.strerror, path) from error

    def read(self, start: int, stop: int) -> memoryview:
        """See `FileView.read`."""
        size = 0 if self._map is None else min(self._map.size(), len(self._map))
        if not 0 <= start <= stop <= size:
            raise too_short(self._path, start, stop, size)
        return memoryview(b"" if self._map is None else self._map)[start:stop]


class RangedFile:
    """A file that is read range by range.

    Args:
        name: Name for error messages.
        read: Returns bytes `start` to `stop`, fewer where the file is shorter.
        size: Returns the size of the file.
    """

    def __init__(self, name: str, read: Callable[[int, int], bytes], size: Callable[[], int]) -> None:
        self._name = name
        self._read = read
        self._size = size

    def read(self, start: int, stop: int) -> bytes:
        """See `FileView.read`."""
        if not 0 <= start <= stop:
            raise too_short(self._name, start, stop, 0)
        try:
            data = self._read(start, stop) if stop > start else b""
        except OSError as error:  # some servers refuse a range beyond the end
            size = self._size()
            if size < stop:
                raise too_short(self._name, start, stop, size) from error
            raise
        if len(data) != stop - start:
            raise too_short(self._name, start, stop, start + len(data))
        return data
