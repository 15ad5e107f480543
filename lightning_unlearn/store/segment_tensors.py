"""The named tensors of one segment file: those of its head are in memory, the others are read in slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_unlearn.store.segment import NUMPY, read_header
from lightning_unlearn.utilities.file_views import Raw

__all__ = ["Read", "SegmentTensors"]

Read: TypeAlias = Callable[[int, int], Raw]
"""Returns bytes of a file from one place to another, all of them, or raises `EOFError`."""


class SegmentTensors:
    """Where each tensor lies, and what is in it; nothing is checked here but places.

    Args:
        head: The head of the file.
        read: Reads from the file.

    Attributes:
        compression: What the header says of the payload.

    Raises:
        ValueError, KeyError, TypeError, IndexError, AttributeError: the head cannot be made sense of.
    """

    def __init__(self, head: Raw, read: Read) -> None:
        header, first = read_header(head)
        self.compression: object = header.pop("__metadata__")["compression"]
        self._head = head
        self._read = read
        self._spans: dict[str, tuple[np.dtype[Any], int, int]] = {}
        for name, info in header.items():
            start, stop = info["data_offsets"]
            self._spans[name] = NUMPY[info["dtype"]], first + int(start), first + int(stop)

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._spans)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Data type of a tensor."""
        return self._spans[name][0]

    def span(self, name: str) -> tuple[int, int]:
        """Where in the file a tensor begins and ends, in bytes."""
        return self._spans[name][1:]

    def length(self, name: str) -> int:
        """Number of elements of a tensor."""
        dtype, first, last = self._spans[name]
        return (last - first) // dtype.itemsize

    def column(self, name: str) -> npt.NDArray[Any]:
        """A tensor of the head."""
        dtype, start, stop = self._spans[name]
        return np.frombuffer(memoryview(self._head)[start:stop], dtype)

    def slice(self, name: str, start: int, stop: int, width: int = 1) -> Raw:
        """Elements `start` to `stop` of a tensor of the body, or of groups of `width` elements, read now.

        Raises:
            ValueError: the tensor has fewer.
            EOFError: the file is shorter than that.
        """
        dtype, first, last = self._spans[name]
        size = width * dtype.itemsize
        if not 0 <= start <= stop <= (last - first) // size:
            raise ValueError(f"{name} from {start} to {stop} of {(last - first) // size}")
        return self._read(first + start * size, first + stop * size)

    def whole(self, name: str) -> Raw:
        """All of a tensor of the body, read now; raises as `slice`."""
        return self.slice(name, 0, self.length(name))
