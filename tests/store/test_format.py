"""The documented format is enough: the reader on its page, run as it stands there, reads what was written."""

import hashlib
import json
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lightning_unlearn.types import StepStatus
from tests.helpers.stores import SIZES, Steps, make_store

PAGE = Path(__file__).parents[2] / "docs" / "store-format.md"
NAMES, SHAPES = ("a", "b", "c", "d"), ((20, 15), (8,), (4, 4, 4), ())


@pytest.fixture(scope="module")
def reader():
    code = PAGE.read_text().split("```python\n")[1].split("```")[0]
    assert "lightning_unlearn" not in code
    assert len(code.splitlines()) <= 110
    namespace = {}
    exec(compile(code, str(PAGE), "exec"), namespace)  # noqa: S102
    return namespace


@pytest.mark.parametrize("keep", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "scaled_float16"])
@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_reader_of_the_page(tmp_path, reader, keep, value_dtype, compression, world_size):
    steps = Steps(keep=keep, keys=world_size == 2)
    store = make_store(tmp_path / "s", value_dtype=value_dtype, compression=compression, world_size=world_size)
    for rank in range(world_size):
        with store.writer(rank, segment_bytes=2000) as writer:
            for step in range(5 + rank):
                mine = [delta for delta in steps[step]["deltas"] if delta.layer % world_size == rank]
                writer.append(**{**steps[step], "deltas": mine})
    store.refresh()
    read = reader["read"](store.url)
    assert len(read) == store.n_steps == 5
    for step, (ids, batch_size, seconds, status, changes) in enumerate(read):
        want = steps[step]
        assert Counter(ids) == Counter(want["sample_ids"] * world_size)
        assert (batch_size, seconds, status) == (4 * world_size, want["seconds"], StepStatus.STORED)
        assert set(changes) == set(NAMES)
        for delta in want["deltas"]:
            dense = np.zeros(SIZES[delta.layer], np.float32)
            dense[slice(None) if delta.indices is None else delta.indices.numpy()] = delta.values.numpy()
            got, exact = changes[NAMES[delta.layer]], dense.reshape(SHAPES[delta.layer])
            relative = {"float32": 0, "bfloat16": 2**-8}.get(value_dtype, 2**-10.9)
            floor = np.abs(exact).max() * 2**-24 if value_dtype == "scaled_float16" else 0
            np.testing.assert_allclose(got, exact, rtol=relative, atol=floor)
            ours = store.read(step)[NAMES[delta.layer]]
            picked = got.reshape(-1)[slice(None) if ours.indices is None else ours.indices.numpy()]
            assert np.array_equal(picked, ours.values.numpy())


def test_the_checksums_are_those_of_the_page(tmp_path, reader):
    steps = Steps(keys=True)
    store = make_store(tmp_path / "s")
    with store.writer() as writer:
        steps.fill(writer, 4)
    commit = next((tmp_path / "s" / "rank-00000").glob("commit-*.json"))
    for path in (commit, tmp_path / "s" / "store.json", tmp_path / "s" / store.lineage_file):
        envelope = json.loads(path.read_text())
        kind = envelope["format"].split("/")[1]
        text = json.dumps([kind, envelope["version"], envelope["body"]], sort_keys=True, separators=(",", ":"))
        assert envelope["checksum"] == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    (ref,) = reader["document"](commit)["segments"]
    data = (commit.parent / ref["name"]).read_bytes()
    assert ref["bytes"] == len(data)
    assert ref["digest"] == hashlib.blake2b(data[: ref["head_bytes"]], digest_size=16).hexdigest()
    _, t = reader["tensors"](commit.parent / ref["name"])
    for i in range(4):
        ids = reader["sample_ids"](t, i)
        numbers = (i, t["optimizer"][i], t["batch_size"][i], t["seconds"][i], t["status"][i], len(ids))
        covered = struct.pack("<qqqdqq", *(getattr(number, "item", lambda n=number: n)() for number in numbers))
        if all(isinstance(one, int) for one in ids):
            covered += np.array(ids, "<i8").tobytes()
        else:
            texts = [("s" if isinstance(one, str) else "i").encode() + str(one).encode() for one in ids]
            covered += b"".join(struct.pack("<q", len(text)) + text for text in texts)
        for e in range(t["entry_offset"][i], t["entry_offset"][i + 1]):
            names = ("layer", "kept", "index_codec", "value_dtype", "scale", "index_bytes", "value_bytes")
            covered += struct.pack("<iqBBdqq", *(t[f"entry.{name}"][e].item() for name in names))
        covered += struct.pack("<I", t["payload_crc32"][i])
        assert zlib.crc32(covered) == t["record_crc32"][i]


def test_the_version_on_the_page():
    from lightning_unlearn.store.documents import FORMAT_VERSION

    assert PAGE.read_text().startswith(f"# Store format, version {FORMAT_VERSION}\n")
