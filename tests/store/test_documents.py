import hashlib
import json

import pytest

from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.documents import FORMAT_VERSION, from_document, to_document

BODY = {"text": "grün", "number": 0.1, "list": [[1, 2]], "none": None}


def test_round_trip():
    assert from_document("note", "n", to_document("note", BODY)) == BODY


def test_every_flipped_bit_is_found_or_harmless():
    data, found = to_document("note", BODY), 0
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            try:
                assert from_document("note", "n", bytes(damaged)) == BODY  # a blank became another blank
            except StoreCorruptedError:
                found += 1
    assert found > 0.9 * 8 * len(data)


@pytest.mark.parametrize("length", [0, 1, 50, 150])
def test_truncated(length):
    with pytest.raises(StoreCorruptedError, match="`n` to be an intact note"):
        from_document("note", "n", to_document("note", BODY)[:length])


def test_another_kind():
    with pytest.raises(StoreCorruptedError, match="note"):
        from_document("note", "n", to_document("other", BODY))


def test_another_version_is_intact_but_refused():
    version = FORMAT_VERSION + 1
    text = json.dumps(["note", version, BODY], sort_keys=True, separators=(",", ":")).encode()
    envelope = {
        "format": "lightning-unlearn/note",
        "version": version,
        "checksum": hashlib.blake2b(text, digest_size=16).hexdigest(),
        "body": BODY,
    }
    with pytest.raises(StoreMismatchError, match=f"version 1 to {FORMAT_VERSION}, but got {version}"):
        from_document("note", "n", json.dumps(envelope).encode())


def test_numbers_that_json_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        to_document("note", {"travel": float("nan")})
