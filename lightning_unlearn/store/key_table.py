"""Sample ids that are not 64-bit integers: their texts, and the sorted table that gives each a number."""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Collection, Iterable

import numpy as np
import numpy.typing as npt

from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.file_views import Raw

__all__ = ["KEY_BLOCK", "KeyTable", "fits_int64", "id_text"]

KEY_BLOCK = 1024
"""Number of keys under one checksum."""

_INT64 = range(-(2**63), 2**63)


def fits_int64(sample_ids: Collection[SampleId]) -> bool:
    """Whether all ids are integers that fit into 64 bits.

    >>> fits_int64([1, -5]), fits_int64([2**63]), fits_int64(["1"])
    (True, False, False)
    """
    return all(isinstance(sample_id, int) and sample_id in _INT64 for sample_id in sample_ids)


def id_text(sample_id: SampleId) -> bytes:
    """`s` and the UTF-8 of a string, or `i` and the decimal digits of an integer.

    >>> id_text("7"), id_text(7)
    (b's7', b'i7')
    """
    kind = "s" if isinstance(sample_id, str) else "i"
    return f"{kind}{sample_id}".encode("utf-8", "surrogatepass")


def _text_id(text: bytes) -> SampleId:
    value = text[1:].decode("utf-8", "surrogatepass")
    return value if text[:1] == b"s" else int(value)


class KeyTable:
    """Distinct ids of a segment, sorted by their text; the place of an id is its code, so codes are sorted as well.

    Only the blocks that a look-up needs are touched, and each is checked before its first use.

    Args:
        offsets: int64 of shape (n + 1,), where each text starts in `text`.
        text: All texts, one after the other.
        crc32: Checksum of every block of `KEY_BLOCK` keys; `None` reads without checking.
        checked: Which blocks were checked before; shared by all tables over the same bytes.
    """

    def __init__(
        self,
        offsets: npt.NDArray[np.int64],
        text: Raw,
        crc32: npt.NDArray[np.uint32] | None = None,
        checked: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        self.offsets = offsets
        self.text = text
        self._crc32 = crc32
        self._checked = np.zeros(-(-len(self) // KEY_BLOCK), np.bool_) if checked is None else checked

    @classmethod
    def of(cls, sample_ids: Iterable[SampleId]) -> KeyTable:
        """The table of these ids.

        >>> table = KeyTable.of(["b", 7, "a", "b"])
        >>> table[0], table.codes(["b", "c", 7]).tolist()
        (7, [2, -1, 0])
        """
        return cls.of_texts({id_text(sample_id) for sample_id in sample_ids})

    @classmethod
    def of_texts(cls, texts: Iterable[bytes]) -> KeyTable:
        """The table of these distinct texts."""
        ordered = sorted(texts)
        return cls(np.cumsum([0, *map(len, ordered)], dtype=np.int64), b"".join(ordered))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def block_crc(self, block: int) -> int:
        """CRC-32 of the offsets (both ends) and of the texts of a block.

        Raises:
            ValueError: the offsets do not lie in the text.
        """
        part = self.offsets[block * KEY_BLOCK : (block + 1) * KEY_BLOCK + 1]
        start, stop = int(part[0]), int(part[-1])
        if not 0 <= start <= stop <= len(self.text):
            raise ValueError(f"keys from byte {start} to {stop} of {len(self.text)}")
        return zlib.crc32(self.text[start:stop], zlib.crc32(part.tobytes()))

    def block_crcs(self) -> npt.NDArray[np.uint32]:
        """CRC-32 of every block."""
        return np.array([self.block_crc(block) for block in range(len(self._checked))], "<u4")

    def check(self) -> None:
        """Check every block.

        Raises:
            ValueError: one does not fit its checksum.
        """
        for block in range(len(self._checked)):
            self._check(block)

    def _check(self, block: int) -> None:
        if self._crc32 is None or self._checked[block]:
            return
        if self.block_crc(block) != int(self._crc32[block]):
            raise ValueError(f"block {block} of the key table does not fit its checksum")
        self._checked[block] = True

    def key(self, code: int) -> bytes:
        """Text of a code.

        Raises:
            ValueError: there is no such code, or its block does not fit its checksum.
        """
        if not 0 <= code < len(self):
            raise ValueError(f"code {code} in a table of {len(self)} ids")
        self._check(code // KEY_BLOCK)
        return bytes(self.text[self.offsets[code] : self.offsets[code + 1]])

    def __getitem__(self, code: int) -> SampleId:
        return _text_id(self.key(code))

    def codes(self, sample_ids: Iterable[SampleId]) -> npt.NDArray[np.int64]:
        """Code of each id, -1 where the table does not hold it."""
        found = []
        for text in map(id_text, sample_ids):
            place = bisect.bisect_left(range(len(self)), text, key=self.key)
            found.append(place if place < len(self) and self.key(place) == text else -1)
        return np.array(found, np.int64)
