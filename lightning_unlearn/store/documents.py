"""Small JSON documents that carry their kind, format version and checksum."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.file_views import Raw

__all__ = ["FORMAT_VERSION", "digest_of", "document_version", "from_document", "to_document"]

FORMAT_VERSION = 2
"""Version of the store format (`docs/store-format.md`) that is written; older ones are read, newer ones refused."""


def digest_of(*chunks: Raw) -> str:
    """Hex BLAKE2b-128 of the chunks, one after the other.

    >>> digest_of(b"ab", b"c") == digest_of(b"abc")
    True
    """
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _checksum(kind: str, version: int, body: Any) -> str:
    return digest_of(json.dumps([kind, version, body], sort_keys=True, separators=(",", ":")).encode())


def to_document(kind: str, body: dict[str, Any]) -> bytes:
    """JSON bytes of `body` in an envelope of kind, version and checksum.

    >>> from_document("note", "note.json", to_document("note", {"a": 1}))
    {'a': 1}
    """
    envelope = {
        "format": f"lightning-unlearn/{kind}",
        "version": FORMAT_VERSION,
        "checksum": _checksum(kind, FORMAT_VERSION, body),
        "body": body,
    }
    return json.dumps(envelope, indent=1, allow_nan=False).encode()


def from_document(kind: str, name: str, data: bytes) -> dict[str, Any]:
    """The body of a document.

    Args:
        kind: The kind it must be of.
        name: Name for error messages.
        data: The file's content.

    Raises:
        StoreCorruptedError: not JSON, not this kind, or the checksum does not fit.
        StoreMismatchError: intact, but of a newer format version.
    """
    try:
        envelope = json.loads(data)
        body, version, found = envelope["body"], envelope["version"], envelope["format"]
        intact = envelope["checksum"] == _checksum(kind, version, body) and found == f"lightning-unlearn/{kind}"
        intact = intact and type(version) is int
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreCorruptedError(
            expected(name, f"an intact {kind} document", str(error), "Restore it from a copy of the store.")
        ) from error
    if not intact:
        raise StoreCorruptedError(
            expected(name, f"a {kind} document whose checksum fits", "another", "Restore it from a copy of the store.")
        )
    if not 1 <= version <= FORMAT_VERSION:
        rule = f"of format version 1 to {FORMAT_VERSION}"
        raise StoreMismatchError(expected(name, rule, version, "Use the release that wrote it."))
    return dict(body)


def document_version(data: bytes) -> int:
    """The format version of a document that `from_document` read.

    >>> document_version(to_document("note", {})) == FORMAT_VERSION
    True
    """
    return int(json.loads(data)["version"])
