import builtins
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.store.codec import VALUE_CODES, EncodedLayer, encode_layer
from lightning_unlearn.store.compression import check_compression, join_payload, split_payload
from lightning_unlearn.types import IndexCodec, LayerDelta

NUMEL = 40_000


def layers(value_dtype="scaled_float16"):
    rng = np.random.default_rng(0)
    made = []
    for layer, kept in enumerate([4000, 0, 20_000, NUMEL, 30]):
        indices = torch.from_numpy(np.sort(rng.choice(NUMEL, kept, replace=False)))
        values = torch.from_numpy(rng.standard_normal(kept).astype(np.float32))
        made.append(encode_layer(LayerDelta(layer, indices, values), NUMEL, value_dtype))
    return made


def bare(layer):
    return type(layer)(
        layer.layer, layer.kept, layer.index_codec, layer.value_dtype, layer.scale, layer.index[:0], layer.value[:0]
    )


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("value_dtype", VALUE_CODES)
def test_round_trip(compression, value_dtype):
    made = layers(value_dtype)
    payload = join_payload(made, compression)
    parts = [(bare(layer), layer.index.size, layer.value.size) for layer in made]
    for got, want in zip(split_payload(payload, parts, compression), made, strict=True):
        assert np.array_equal(got.index, want.index)
        assert np.array_equal(got.value, want.value)
    assert split_payload(b"", [], compression) == []


def positions_only(codec, index, kept):
    return EncodedLayer(0, kept, codec, "float32", 1.0, index, index[:0])


def test_positions_come_close_to_their_entropy():
    sparse = layers()[0]
    assert sparse.index_codec is IndexCodec.GAP8
    packed = join_payload([positions_only(IndexCodec.GAP8, sparse.index, sparse.kept)], "zstd")
    assert len(packed) < 1.1 * 0.586 * sparse.kept  # H(0.1) / 0.1 / 8 bytes for each kept entry


@pytest.mark.parametrize(("codec", "word"), [(IndexCodec.BLOCK8, "<u1"), (IndexCodec.BLOCK16, "<u2")])
def test_low_words_become_differences_and_planes(codec, word):
    rng = np.random.default_rng(1)
    low = np.sort(rng.integers(0, 2 ** (8 * np.dtype(word).itemsize), 3000)).astype(word)
    index = np.concatenate([low.view(np.uint8), rng.integers(0, 9, 16).astype(np.uint8)])
    made = positions_only(codec, index, low.size)
    payload = join_payload([made], "zstd")
    plain = zstandard.ZstdDecompressor().decompress(payload)
    differences = np.diff(low.astype(int), prepend=0).astype(word)
    planes = differences.view(np.uint8).reshape(low.size, -1).T
    assert plain == planes.tobytes() + index[-16:].tobytes()
    (back,) = split_payload(payload, [(bare(made), index.size, 0)], "zstd")
    assert np.array_equal(back.index, index)


def test_a_frame_that_claims_another_size_is_refused_before_memory_is_reserved():
    made = layers()
    parts = [(bare(layer), layer.index.size, layer.value.size) for layer in made]
    honest = join_payload(made, "zstd")
    bomb = zstandard.ZstdCompressor().compress(bytes(2**28))  # a few KB that want 256 MiB
    huge = b"\x28\xb5\x2f\xfd\xe0" + (2**45).to_bytes(8, "little") + honest[9:]  # a header that claims 32 TiB
    assert zstandard.frame_content_size(huge) == 2**45
    tracemalloc.start()
    try:
        for payload in (bomb, huge, honest + b"more", honest + honest):
            with pytest.raises(ValueError, match=r".+"):
                split_payload(payload, parts, "zstd")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"\0" + data[1:]])
def test_a_payload_that_does_not_fit(change):
    made = layers()
    parts = [(bare(layer), layer.index.size, layer.value.size) for layer in made]
    with pytest.raises(ValueError, match=r".+"):
        split_payload(change(join_payload(made, "zstd")), parts, "zstd")
    with pytest.raises(ValueError, match="bytes where"):
        split_payload(join_payload(made, None)[:-1], parts, None)


def test_without_the_package(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "zstandard":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    check_compression(None)
    with pytest.raises(MissingRequirementError, match=r"lightning-unlearn\[zstd\]"):
        check_compression("zstd")


def test_unknown_compression():
    with pytest.raises(ValueError, match="compression"):
        check_compression("gzip")
