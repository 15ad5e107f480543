import builtins

import numpy as np
import pytest
import torch

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.store.codec import encode_layer
from lightning_unlearn.store.compression import check_compression, join_payload, split_payload
from lightning_unlearn.types import LayerDelta

NUMEL = 40_000


def layers(value_dtype="scaled_float16"):
    rng = np.random.default_rng(0)
    made = []
    for layer, kept in enumerate([4000, 0, 20_000, NUMEL]):
        indices = torch.from_numpy(np.sort(rng.choice(NUMEL, kept, replace=False)))
        values = torch.from_numpy(rng.standard_normal(kept).astype(np.float32))
        made.append(encode_layer(LayerDelta(layer, indices, values), NUMEL, value_dtype))
    return made


def bare(layer):
    return type(layer)(
        layer.layer, layer.kept, layer.index_codec, layer.value_dtype, layer.scale, layer.index[:0], layer.value[:0]
    )


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "scaled_float16"])
def test_round_trip(compression, value_dtype):
    made = layers(value_dtype)
    payload = join_payload(made, compression)
    parts = [(bare(layer), layer.index.size, layer.value.size) for layer in made]
    for got, want in zip(split_payload(payload, parts, compression), made, strict=True):
        assert np.array_equal(got.index, want.index)
        assert np.array_equal(got.value, want.value)
    assert split_payload(b"", [], compression) == []


def test_the_filters_pay():
    sparse = layers()[0]
    import zstandard

    plain = zstandard.ZstdCompressor(level=1).compress(sparse.index.tobytes())
    index_only = type(sparse)(0, sparse.kept, sparse.index_codec, "float32", 1.0, sparse.index, sparse.value[:0])
    filtered = join_payload([index_only], "zstd")
    # the entropy of the positions is 0.586 bytes for each kept entry at this density
    assert len(filtered) < 0.75 * sparse.kept < 0.95 * len(plain)


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
