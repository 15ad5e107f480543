"""Opening the segments of a store, of every format version that can be read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.documents import FORMAT_VERSION, digest_of
from lightning_unlearn.store.segment import SegmentRef, read_header
from lightning_unlearn.store.segment_reader import Segment
from lightning_unlearn.store.segment_tensors import Read
from lightning_unlearn.store.version1 import VERSION_1, segment_of_version1
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.file_views import DAMAGE, FileView, Raw, too_short
from lightning_unlearn.utilities.files import Files

__all__ = ["Views", "corrupted", "load_segment", "open_segment", "whole_file"]

_OPEN_FILES = 64


def corrupted(name: str, steps: Sequence[int], problem: object) -> StoreCorruptedError:
    """The error for a damaged file: which one, the steps it costs, and what to do."""
    lost = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}" if steps else "no step"
    return StoreCorruptedError(
        f"Expected `{name}` to be intact, but got: {problem}. Affected: {lost}. `lightning-unlearn store verify` lists "
        "the damage; `DeltaStore.open(url, check=False).repair()` drops what is damaged and keeps the rest."
    )


class Views:
    """Views of the files of a store, of which a limited number is open at a time.

    Args:
        files: The store's directory.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self._open: OrderedDict[str, FileView] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "_open": OrderedDict()}  # what is mapped stays in this process

    def read(self, name: str, start: int, stop: int) -> Raw:
        """Bytes of a file, all of them; raises `EOFError` where it is shorter."""
        view = self._open.pop(name, None) or self.files.view(name)
        self._open[name] = view
        while len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)  # closed once nobody refers to what was read from it
        return view.read(start, stop)


def whole_file(files: Files, name: str, *, mapped: bool = True) -> Read:
    """Reads from a file all of which will be needed: mapped where it is local, else fetched in one request.

    Args:
        files: The store's directory.
        name: Name of the file in it.
        mapped: Whether a local file may be mapped, which keeps it open.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read now.
    """
    if files.is_local and mapped:
        return files.view(name).read
    data = memoryview(files.read(name))

    def read(start: int, stop: int) -> Raw:
        if not 0 <= start <= stop <= len(data):
            raise too_short(name, start, stop, len(data))
        return data[start:stop]

    return read


def open_segment(ref: SegmentRef, head: Raw, read: Read, *, at_once: bool = False, check: bool = True) -> Segment:
    """A segment of any version; see `Segment`.

    Raises:
        ValueError: the head cannot be read.
        StoreMismatchError: it is of a newer version.
    """
    try:
        version = int(read_header(head)[0]["__metadata__"]["version"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"unreadable head ({error!r})") from error
    if version == VERSION_1:
        return segment_of_version1(ref, head, read)
    if version > FORMAT_VERSION and check:
        remedy = "Use the release that wrote it."
        raise StoreMismatchError(expected(ref.name, f"of format version 1 to {FORMAT_VERSION}", version, remedy))
    return Segment(ref, head, read, at_once=at_once, check=check)


def load_segment(files: Files, directory: str, ref: SegmentRef, views: Views | None = None) -> Segment:
    """A segment whose head was checked against its commit; nothing but the head is read.

    Raises:
        StoreCorruptedError: the head is missing or damaged.
    """
    name = f"{directory}/{ref.name}"
    try:
        head = files.read(name, 0, ref.head_bytes)
        if digest_of(head) != ref.digest:
            raise ValueError("the head does not fit its checksum")
        read = partial((views or Views(files)).read, name)
        return open_segment(ref, head, read, at_once=not files.is_local)
    except StoreMismatchError:
        raise
    except DAMAGE as error:
        raise corrupted(name, range(ref.start, ref.stop), error) from error
