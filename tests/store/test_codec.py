import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.store.codec import VALUE_CODES, decode_layer, encode_layer, relative_rounding_error
from lightning_unlearn.types import IndexCodec, LayerDelta

TINY = 2.0**-149


@st.composite
def layers(draw):
    numel = draw(st.integers(0, 3000))
    kept = draw(st.integers(0, numel))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    indices = np.sort(rng.choice(numel, kept, replace=False)) if numel else np.empty(0, np.int64)
    kind = draw(st.sampled_from([np.int32, np.int64]))
    # magnitudes over all of float32, subnormal numbers included
    low = draw(st.integers(-149, 120))
    exponents = rng.integers(low, min(low + draw(st.integers(1, 40)), 127), kept)
    values = np.ldexp(rng.uniform(-1, 1, kept), exponents).astype(np.float32)
    values[rng.random(kept) < 0.1] = 0.0
    return numel, LayerDelta(3, torch.from_numpy(indices.astype(kind)), torch.from_numpy(values))


def bound(values, value_dtype):
    magnitude = np.abs(values.astype(np.float64))
    if value_dtype == "float32":
        return np.zeros_like(magnitude)
    if value_dtype == "bfloat16":
        return magnitude * 2**-8 + 2.0**-134
    if value_dtype == "int8":
        return np.full_like(magnitude, magnitude.max(initial=0.0) / 127 * (0.5 + 2**-15) + TINY)
    return np.maximum(magnitude * 2**-10.99, magnitude.max(initial=0.0) * 2**-24) + TINY


@settings(max_examples=300, deadline=None)
@given(layers(), st.sampled_from(VALUE_CODES))
def test_round_trip(layer, value_dtype):
    numel, delta = layer
    encoded = encode_layer(delta, numel, value_dtype)
    decoded = decode_layer(encoded, numel)
    assert decoded.layer == 3
    assert encoded.kept == delta.values.numel()
    if encoded.index_codec is IndexCodec.DENSE:
        assert decoded.indices is None
        assert delta.values.numel() == numel
        assert not encoded.index.size
    else:
        assert decoded.indices.dtype == torch.int64
        assert torch.equal(decoded.indices, delta.indices.long())
    want, got = delta.values.numpy(), decoded.values.numpy()
    assert decoded.values.dtype == torch.float32
    assert (np.abs(got.astype(np.float64) - want.astype(np.float64)) <= bound(want, value_dtype)).all()


@settings(max_examples=100, deadline=None)
@given(layers())
def test_scaled_values_are_a_fixed_point(layer):
    numel, delta = layer
    once = decode_layer(encode_layer(delta, numel, "scaled_float16"), numel)
    twice = decode_layer(encode_layer(once, numel, "scaled_float16"), numel)
    assert torch.equal(once.values, twice.values)


@settings(max_examples=100, deadline=None)
@given(st.lists(layers(), max_size=4), st.sampled_from(VALUE_CODES))
def test_the_rounding_error_is_the_relative_distance_of_what_is_read(made, value_dtype):
    pairs = [(delta, encode_layer(delta, numel, value_dtype)) for numel, delta in made]
    exact = np.concatenate([[], *(delta.values.double().numpy() for _, delta in made)])
    read = [
        decode_layer(encoded, numel).values.double().numpy()
        for (numel, _), (_, encoded) in zip(made, pairs, strict=True)
    ]
    norm = np.linalg.norm(exact)
    want = np.linalg.norm(np.concatenate([[], *read]) - exact) / norm if norm > 1e-150 else None
    got = relative_rounding_error(pairs)
    assert got >= 0.0
    assert want is None or got == pytest.approx(want, rel=1e-9, abs=1e-300)


def test_dense_needs_no_positions():
    delta = LayerDelta(0, None, torch.arange(6.0))
    encoded = encode_layer(delta, 6, "float32")
    assert encoded.index.size == 0
    assert encoded.value.size == 24
    assert decode_layer(encoded, 6).indices is None


@pytest.mark.parametrize("value_dtype", ["bfloat16", "scaled_float16", "int8"])
@pytest.mark.parametrize("value", [3.4028234663852886e38, -3.4e38, 1.0, TINY, -TINY, 2.0**-126])
def test_extremes_stay_finite_and_close(value, value_dtype):
    delta = LayerDelta(0, torch.tensor([1]), torch.tensor([value]))
    got = float(decode_layer(encode_layer(delta, 9, value_dtype), 9).values[0])
    assert abs(got - value) <= max(abs(value) * (2**-7.9 if value_dtype == "bfloat16" else 2**-10.9), TINY)


@pytest.mark.parametrize("value_dtype", VALUE_CODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, value_dtype):
    with pytest.raises(ValueError, match="finite"):
        encode_layer(LayerDelta(0, torch.tensor([0]), torch.tensor([value])), 2, value_dtype)


@pytest.mark.parametrize("indices", [[1, 0], [0, 0], [-1, 0], [0, 4], [0, 1, 2]])
def test_positions_must_fit(indices):
    with pytest.raises(ValueError, match="ascending positions below 4"):
        encode_layer(LayerDelta(0, torch.tensor(indices), torch.ones(2)), 4, "float32")


def test_dense_values_must_fit():
    with pytest.raises(ValueError, match="ascending positions"):
        encode_layer(LayerDelta(0, None, torch.ones(3)), 4, "float32")


def test_half_precision_and_shapes_are_taken():
    delta = LayerDelta(0, torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0.5, 2.0], dtype=torch.bfloat16))
    assert decode_layer(encode_layer(delta, 3, "float32"), 3).values.tolist() == [0.5, 2.0]
