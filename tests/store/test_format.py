"""The documented format is enough: the reader on its page, run as it stands there, reads what was written."""

import hashlib
import json
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard

from lightning_unlearn.store.codec import EncodedLayer
from lightning_unlearn.store.compression import join_payload
from lightning_unlearn.store.documents import FORMAT_VERSION
from lightning_unlearn.store.position_codes import decode_positions
from lightning_unlearn.types import IndexCodec, StepStatus
from tests.helpers.stores import SIZES, Steps, make_store
from tests.store.test_layout import store_of

PAGE = Path(__file__).parents[2] / "docs" / "store-format.md"
NAMES, SHAPES = ("a", "b", "c", "d"), ((20, 15), (8,), (4, 4, 4), ())


@pytest.fixture(scope="module")
def reader():
    code = PAGE.read_text().split("```python\n")[1].split("```")[0]
    assert "lightning_unlearn" not in code
    assert len(code.splitlines()) <= 125
    namespace = {}
    exec(compile(code, str(PAGE), "exec"), namespace)  # noqa: S102
    return namespace


@pytest.mark.parametrize("keep", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "scaled_float16", "int8"])
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
            relative = {"float32": 0, "bfloat16": 2**-8}.get(value_dtype, 2**-10.9 * (value_dtype != "int8"))
            floor = np.abs(exact).max() * {"scaled_float16": 2**-24, "int8": 0.501 / 127}.get(value_dtype, 0)
            np.testing.assert_allclose(got, exact, rtol=relative, atol=floor)
            ours = store.read(step)[NAMES[delta.layer]]
            picked = got.reshape(-1)[slice(None) if ours.indices is None else ours.indices.numpy()]
            assert np.array_equal(picked, ours.values.numpy())


@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_the_reader_of_the_page_joins_pieces(tmp_path, reader, keep):
    store = store_of(tmp_path / "cut", keep, cut=True)
    for step, (*_, changes) in enumerate(reader["read"](store.url)):
        ours = store.read(step)
        assert set(changes) == set(ours)
        for name, delta in ours.items():
            flat = np.zeros(changes[name].size, np.float32)
            flat[slice(None) if delta.indices is None else delta.indices.numpy()] = delta.values.numpy()
            assert np.array_equal(changes[name], flat.reshape(changes[name].shape))


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
        names = ("optimizer", "batch_size", "seconds", "status", "pruning_error", "rounding_error", "edited")
        optimizer, size, seconds, status, pruning, rounding, edited = (t[name][i].item() for name in names)
        covered = struct.pack("<qqqdqqffq", i, optimizer, size, seconds, status, len(ids), pruning, rounding, edited)
        if all(isinstance(one, int) for one in ids):
            covered += np.array(ids, "<i8").tobytes()
        else:
            texts = [("s" if isinstance(one, str) else "i").encode() + str(one).encode() for one in ids]
            covered += b"".join(struct.pack("<q", len(text)) + text for text in texts)
        covered += t["entries"][38 * t["entry_offset"][i] : 38 * t["entry_offset"][i + 1]].tobytes()
        covered += struct.pack("<I", t["payload_crc32"][i])
        assert zlib.crc32(covered) == t["record_crc32"][i]
    assert ref["body_bytes"] == len(data) - ref["head_bytes"] - t["payload"].size
    index = t["index.ids"], t["index.steps"]
    assert t["index.crc32"].tolist() == [zlib.crc32(index[0].tobytes() + index[1].tobytes())]
    assert t["index.fence"].tolist() == [index[0].min()]
    pairs = [(one, i) for i in range(4) for one in t["ids"][t["ids_offset"][i] : t["ids_offset"][i + 1]].tolist()]
    assert sorted(pairs) == list(zip(index[0].tolist(), index[1].tolist(), strict=True))
    assert t["key.crc32"].tolist() == [zlib.crc32(t["key.offset"].tobytes() + t["key.text"].tobytes())]


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("codec", list(IndexCodec))
def test_every_codec_of_positions(reader, codec, zstd):
    """Each is decoded by the page's reader, whatever the writer would have chosen."""
    rng = np.random.default_rng(0)
    numel = 200_000
    where = np.arange(numel) if codec is IndexCodec.DENSE else np.sort(rng.choice(numel, 700, replace=False))
    blocks = {IndexCodec.BLOCK8: (8, "<u2"), IndexCodec.BLOCK16: (16, "<u4")}
    if codec in blocks:
        bits, counts = blocks[codec]
        low = where.astype(f"<u{bits // 8}").view(np.uint8)
        data = np.concatenate([low, np.bincount(where >> bits, minlength=-(-numel >> bits)).astype(counts).view("u1")])
    elif codec is IndexCodec.BITMASK:
        data = np.packbits(np.isin(np.arange(numel), where))
    elif codec is IndexCodec.GAP8:
        gaps = np.diff(where, prepend=-1) - 1
        data = np.array([byte for gap in gaps.tolist() for byte in [255] * (gap // 255) + [gap % 255]], np.uint8)
    else:
        data = np.empty(0, np.uint8)
    assert (decode_positions(codec, data, len(where), numel) is None) == (codec is IndexCodec.DENSE)
    layer = EncodedLayer(0, len(where), codec, "int8", 1.0, data, np.ones(len(where), np.uint8))
    payload = np.frombuffer(join_payload([layer], "zstd" if zstd else None), np.uint8)
    if zstd:
        payload = np.frombuffer(zstandard.ZstdDecompressor().decompress(payload.tobytes()), np.uint8)
    found = reader["positions"](int(codec), len(where), numel, payload[: len(data)], zstd)
    assert np.array_equal(found, where)


def test_the_version_on_the_page():
    assert PAGE.read_text().startswith(f"# Store format, version {FORMAT_VERSION}\n")
