"""What a layer was expected to take, against the encoder that writes it."""

import numpy as np
import pytest
import torch

from lightning_unlearn.store.codec import encode_layer
from lightning_unlearn.store.compression import join_payload
from lightning_unlearn.store.expected_size import expected_layer_bytes, expected_record_bytes
from lightning_unlearn.store.position_codes import chosen_code, encode_positions
from lightning_unlearn.store.records import encode_step
from lightning_unlearn.store.segment import build_segment
from lightning_unlearn.types import IndexCodec, LayerDelta, StepStatus

DENSITIES = [(40, 0.3), (5_000, 0.002), (5_000, 0.02), (60_000, 0.001), (60_000, 0.1), (60_000, 0.14), (200_000, 0.4)]


def layer(numel, keep, seed=0):
    """Entries of which half the rows keep nothing."""
    generator = np.random.default_rng(seed)
    kept = max(1, int(keep * numel))
    live = np.flatnonzero(np.repeat(np.arange(-(-numel // 500)) % 2 == 0, 500)[:numel])
    places = np.sort(generator.choice(live if kept < live.size else numel, kept, replace=False))
    return LayerDelta(0, torch.from_numpy(places), torch.randn(kept, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("spread", [1, 7])
@pytest.mark.parametrize(("numel", "keep"), DENSITIES)
def test_the_rule_is_the_encoders(numel, keep, spread):
    generator = np.random.default_rng(1)
    kept = max(1, int(keep * numel / spread))
    positions = np.sort(generator.choice(numel // spread, kept, replace=False))
    gaps = np.diff(positions, prepend=-1) - 1
    codec, written = encode_positions(positions, numel)
    assert chosen_code(kept, numel, int((gaps // 255).sum())) == (codec, written.size)


def test_every_code_is_met():
    met = {encode_positions(layer(numel, keep).indices.numpy(), numel)[0] for numel, keep in DENSITIES}
    assert met >= {IndexCodec.GAP8, IndexCodec.BITMASK, IndexCodec.BLOCK16}
    assert chosen_code(9, 9, 0) == (IndexCodec.DENSE, 0)
    assert chosen_code(0, 9, 0)[1] == 0


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "scaled_float16", "int8"])
@pytest.mark.parametrize(("numel", "keep"), DENSITIES)
def test_bytes_without_compression(numel, keep, value_dtype):
    encoded = encode_layer(layer(numel, keep), numel, value_dtype)
    expected = expected_layer_bytes(encoded.kept, numel, value_dtype, None)
    assert expected.values == encoded.value.size
    assert expected.positions == pytest.approx(encoded.index.size, rel=0.1, abs=8)
    assert expected.plain == expected.positions + expected.values


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "scaled_float16", "int8"])
def test_zstd_never_makes_it_longer(value_dtype):
    for numel, keep in DENSITIES:
        delta = layer(numel, keep)
        plain, small = (expected_layer_bytes(delta.values.numel(), numel, value_dtype, how) for how in (None, "zstd"))
        assert small.positions <= plain.positions
        assert small.values <= plain.values
    written = len(join_payload([encode_layer(layer(200_000, 0.1), 200_000, "bfloat16")], "zstd"))
    assert small.plain == plain.plain
    expected = expected_layer_bytes(20_000, 200_000, "bfloat16", "zstd")
    assert expected.positions + expected.values == pytest.approx(written, rel=0.2)


@pytest.mark.parametrize("keys", [False, True])
def test_everything_else_about_a_step(keys):
    ids = [[(f"user-{100 * step + i:04d}" if keys else 100 * step + i) for i in range(100)] for step in range(50)]

    def segment(steps):
        encoded = [
            encode_step(
                optimizer=0,
                sample_ids=tuple(ids[step]),
                batch_size=100,
                seconds=0.1,
                status=StepStatus.STORED,
                layers=[encode_layer(LayerDelta(n, None, torch.ones(3)), 3, "int8") for n in range(20)],
                compression=None,
            )
            for step in range(steps)
        ]
        ref, _ = build_segment(encoded, name="s", start=0, rank=0, store_id="x", compression=None)
        return ref.bytes

    each = (segment(50) - segment(10)) / 40 - 20 * 3
    expected = expected_record_bytes(20, 100, key_bytes=9 if keys else None)
    assert expected.columns + expected.ids + expected.entries == pytest.approx(each, rel=0.01)
