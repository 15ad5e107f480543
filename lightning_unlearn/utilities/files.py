"""Files of one directory, local or behind any fsspec URL: whole-file publication that a crash cannot tear.

Every change goes through `Files.perform`, one primitive at a time, so that what a crash between two primitives leaves
behind can be tested by making the n-th one raise.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.file_views import FileView, MappedFile, RangedFile, Raw

__all__ = ["TEMPORARY_PREFIX", "Chunks", "Files"]

Chunks: TypeAlias = bytes | Sequence[Raw]
"""The content of one file; in pieces where joining them would cost a copy."""

TEMPORARY_PREFIX = ".tmp-"
"""How the names of files begin that were not published (yet); whoever owns the directory may remove them."""


def _write_synced(path: str, chunks: Sequence[Raw], mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:  # goes on where the system writes less than it was given
            stream.writelines(chunks)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        if error.filename is not None:
            raise
        # A full disk says neither which file nor how much was to be written.
        reason = f"{error.strerror} (writing {sum(map(len, chunks))} bytes)"
        raise OSError(error.errno, reason, path) from error


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Files:
    """A directory that files are published to, read from and removed from, by names relative to it.

    On a local disk a file is written under a temporary name, synced, and renamed (or linked, where it must not exist
    yet), and the directory is synced: after a crash the old or the new content is there, never a part. Elsewhere one
    PUT does the same, as object stores promise it.

    >>> files = Files("memory://doc-files")
    >>> files.publish("a/b.txt", b"hello")
    >>> files.read("a/b.txt", 1, 3), files.size("a/b.txt"), files.names("a")
    (b'el', 5, ['b.txt'])
    >>> files.delete("a/b.txt"); files.exists("a/b.txt")
    False

    Args:
        url: A local path or an fsspec URL such as `"s3://bucket/run"` or `"memory://run"`.

    Raises:
        MissingRequirementError: nothing that is installed can reach such a URL.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        try:
            self._fs, self._root = url_to_fs(os.fspath(url))
        except (ValueError, ImportError) as error:
            rule, remedy = "a local path or a URL that fsspec can reach", "Install the package of that file system."
            raise MissingRequirementError(expected("url", rule, f"{os.fspath(url)!r} ({error})", remedy)) from error
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.url: str = self._root if self.is_local else str(self._fs.unstrip_protocol(self._root))

    def __repr__(self) -> str:
        return f"Files({self.url!r})"

    def perform(self, primitive: Callable[..., Any], *args: Any) -> None:
        """Run one primitive change; the only place from which anything is written, renamed or removed."""
        primitive(*args)

    def path(self, name: str = "") -> str:
        """Full path of `name` in the file system behind the URL."""
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def sibling(self, suffix: str) -> tuple[Files, str]:
        """The directory that holds this one, and this one's name with `suffix` behind it.

        >>> Files("memory://runs/store").sibling(".key")[1]
        'store.key'
        """
        parent, _, name = self.url.rstrip("/").rpartition("/")
        return Files(parent or "/"), name + suffix

    def exists(self, name: str) -> bool:
        """Whether a file or directory of that name is there."""
        return bool(self._fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        """Size of a file in bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return int(self._fs.size(self.path(name)))

    def names(self, directory: str = "") -> list[str]:
        """Sorted names of the entries of a directory; none where the directory does not exist."""
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self.path(directory), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in entries)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `start` to `stop` of a file; fewer where it is shorter.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if not self.is_local:
            return bytes(self._fs.cat_file(self.path(name), start=start or None, end=stop))
        with open(self.path(name), "rb") as stream:
            stream.seek(start)
            return stream.read() if stop is None else stream.read(stop - start)

    def view(self, name: str) -> FileView:
        """A file that never changes, for reading parts of it: mapped where it is local, range by range elsewhere.

        >>> files = Files("memory://doc-view"); files.publish("a", b"hello")
        >>> files.view("a").read(1, 3)
        b'el'

        Raises:
            FileNotFoundError: there is no such file (elsewhere than on a local disk the first read says so).
        """
        if self.is_local:
            return MappedFile(self.path(name))
        return RangedFile(name, partial(self.read, name), partial(self.size, name))

    def publish(self, name: str, data: Chunks, *, exclusive: bool = False, mode: int = 0o666) -> None:
        """Make `data` the content of `name`, wholly or not at all.

        Args:
            name: Name relative to the directory; missing directories are made.
            data: The content.
            exclusive: Whether the file must not exist yet.
            mode: Permissions of a new local file, before the umask.

        Raises:
            FileExistsError: `exclusive`, and somebody published that name first.
            OSError: it could not be written, for example because the disk is full; the file is named.
        """
        chunks = [data] if isinstance(data, bytes) else list(data)
        path = self.path(name)
        if not self.is_local:
            self.perform(self._put, path, b"".join(chunks), exclusive)
            return
        folder, _, leaf = path.rpartition("/")
        if not os.path.isdir(folder):
            self.perform(self._make_directory, folder)
        temporary = f"{folder}/{TEMPORARY_PREFIX}{leaf}-{secrets.token_hex(4)}"
        try:
            self.perform(_write_synced, temporary, chunks, mode)
        except OSError:
            with suppress(OSError):  # a full disk has no room for what cannot be used
                self.perform(os.unlink, temporary)
            raise
        if exclusive:
            try:
                self.perform(os.link, temporary, path)
            finally:
                self.perform(os.unlink, temporary)
        else:
            self.perform(os.replace, temporary, path)
        self.perform(_sync_directory, folder)

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens where it is gone already."""
        path = self.path(name)
        if self.is_local:
            if os.path.lexists(path):
                self.perform(os.unlink, path)
        elif self.exists(name):
            self.perform(self._fs.rm_file, path)

    def sync(self, directory: str) -> None:
        """Return once what was removed from a local directory stays removed, whatever happens to the machine."""
        if self.is_local:
            self.perform(_sync_directory, self.path(directory))

    def _make_directory(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        _sync_directory(os.path.dirname(folder))

    def _put(self, path: str, data: bytes, exclusive: bool) -> None:
        self._fs.pipe_file(path, data, mode="create" if exclusive else "overwrite")
