import struct

import numpy as np
import pytest
import torch

from lightning_unlearn.store.value_codes import VALUE_CODES, VALUE_WIDTHS, decode_values, encode_values

VALUES = np.array([1.0, -0.3, 0.0, 1e-3, 2.7, -5e-8, 4.4], np.float32)


def by_the_book(value_dtype, scale, data):
    """The documented codes, read one value after the other with the standard library."""
    data = bytes(data)
    if value_dtype == "float32":
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    if value_dtype == "bfloat16":
        return [struct.unpack("<f", b"\0\0" + data[place : place + 2])[0] for place in range(0, len(data), 2)]
    if value_dtype == "int8":
        return [scale * value for value in struct.unpack(f"{len(data)}b", data)]
    return [scale * value for value in struct.unpack(f"<{len(data) // 2}e", data)]


@pytest.mark.parametrize("value_dtype", VALUE_CODES)
@pytest.mark.parametrize("factor", [1.0, 2.0**-140, 2.0**-100, 2.0**100, 2.0**125])
def test_read_as_documented(value_dtype, factor):
    values = (VALUES.astype(np.float64) * factor).astype(np.float32)
    scale, data = encode_values(torch.from_numpy(values), value_dtype)
    assert data.size == VALUE_WIDTHS[value_dtype] * values.size
    read = decode_values(value_dtype, scale, data, values.size)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.array(by_the_book(value_dtype, scale, data), np.float32))


def test_int8_rounds_to_the_nearest_step_ties_to_even():
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.49, -127.0])
    scale, data = encode_values(values, "int8")
    assert scale == 1.0
    assert data.view(np.int8).tolist() == [127, 0, 2, 2, 0, -2, 0, -127]


def test_bytes_anywhere_in_a_payload():
    for value_dtype in VALUE_CODES:
        scale, data = encode_values(torch.from_numpy(VALUES), value_dtype)
        payload = np.frombuffer(b"x" + data.tobytes(), np.uint8)  # unaligned and read-only
        read = decode_values(value_dtype, scale, payload[1:], VALUES.size)
        np.testing.assert_array_equal(read, decode_values(value_dtype, scale, data, VALUES.size))


@pytest.mark.parametrize("value_dtype", VALUE_CODES)
def test_another_number_of_bytes(value_dtype):
    scale, data = encode_values(torch.from_numpy(VALUES), value_dtype)
    with pytest.raises(ValueError, match="7 values"):
        decode_values(value_dtype, scale, data[:-1], VALUES.size)


@pytest.mark.parametrize("value_dtype", VALUE_CODES)
@pytest.mark.parametrize("numel", [32_767, 32_768, 70_001])
def test_pieces_are_put_together_as_one(value_dtype, numel):
    """Long layers are converted piece by piece; every value must be what it is in a layer of few."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    values[:: numel - 1] = 4.0  # the factor of the whole, at both ends
    scale, data = encode_values(values, value_dtype)
    for start in range(0, numel, 9_999):
        few = torch.cat((values[:1], values[start : start + 9_999]))
        factor, piece = encode_values(few, value_dtype)
        width = VALUE_WIDTHS[value_dtype]
        assert factor == scale
        assert piece[width:].tobytes() == data[width * start : width * (start + 9_999)].tobytes()


@pytest.mark.parametrize("value_dtype", VALUE_CODES)
def test_the_largest_numbers_stay_finite(value_dtype):
    most = float(np.finfo(np.float32).max)
    values = torch.tensor([most, -most, most / 2, 2.0**127, 1.0])
    scale, data = encode_values(values, value_dtype)
    read = decode_values(value_dtype, scale, data, values.numel())
    assert np.isfinite(read).all()
    np.testing.assert_allclose(read[:4], values[:4].numpy(), rtol=8e-3)  # half a step of int8
