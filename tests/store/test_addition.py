from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.functional.kernels import KERNEL_VARIABLE
from lightning_unlearn.store.addition import add_encoded
from lightning_unlearn.store.codec import VALUE_CODES, decode_layer, encode_layer
from lightning_unlearn.types import LayerDelta

NUMEL = 70_000
KERNELS = ["numpy", "numba"]


def piece(rng, kept, value_dtype):
    indices = torch.from_numpy(np.sort(rng.choice(NUMEL, kept, replace=False)))
    values = torch.from_numpy(rng.standard_normal(kept).astype(np.float32) * 1e-3)
    return encode_layer(LayerDelta(0, indices, values), NUMEL, value_dtype)


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv(KERNEL_VARIABLE, request.param)
    return request.param


def by_hand(total, pieces):
    """Every piece decoded on its own and added in plain numpy."""
    total = total.numpy().copy()
    for layer, amount in pieces:
        delta = decode_layer(layer, total.size)
        where = slice(None) if delta.indices is None else delta.indices.numpy()
        total[where] += delta.values.double().numpy() * amount
    return total


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 30, 500, 7000, 20_000, NUMEL]), min_size=1, max_size=9),
    st.sampled_from(VALUE_CODES),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_the_sum_is_that_of_the_decoded_pieces(kept, value_dtype, mixed, seed):
    rng = np.random.default_rng(seed)
    dtypes = rng.choice(VALUE_CODES, len(kept)) if mixed else [value_dtype] * len(kept)
    pieces = [(piece(rng, k, str(d)), float(rng.standard_normal())) for k, d in zip(kept, dtypes, strict=True)]
    start = torch.from_numpy(rng.standard_normal(NUMEL))
    sums = []
    for name in KERNELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(KERNEL_VARIABLE, name)
            sums.append(start.clone())
            add_encoded(sums[-1], pieces)
    assert torch.equal(*sums)
    # int8 is not rounded to float32 before it is added, unlike what `decode_layer` returns
    tolerance = 1e-9 if "int8" in set(dtypes) else 1e-15
    np.testing.assert_allclose(sums[0].numpy(), by_hand(start, pieces), rtol=0, atol=tolerance)


@pytest.mark.parametrize("change", ["kept", "value", "index", "bytes without entries", "position"])
@pytest.mark.parametrize("kept", [40, 500, 20_000])
def test_parts_that_do_not_fit(kernel, change, kept):
    whole = piece(np.random.default_rng(0), kept, "bfloat16")
    last = whole.index.copy()
    last[-1:] = 254
    broken = {
        "kept": replace(whole, kept=kept + 1),
        "value": replace(whole, value=whole.value[:-1]),
        "index": replace(whole, index=whole.index[:-1]),
        "bytes without entries": replace(whole, kept=0),
        "position": replace(whole, index=np.concatenate([whole.index, np.full(300, 255, np.uint8), last[-1:]])),
    }[change]
    with pytest.raises(ValueError, match=r".+"):
        add_encoded(torch.zeros(NUMEL, dtype=torch.float64), [(broken, 1.0)])


def test_no_positions_for_values(kernel):
    whole = piece(np.random.default_rng(0), 500, "bfloat16")
    with pytest.raises(ValueError, match="positions"):
        add_encoded(torch.zeros(NUMEL, dtype=torch.float64), [(replace(whole, index=whole.index[:0]), 1.0)])
