import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.store.position_codes import decode_gaps, decode_positions, encode_positions
from lightning_unlearn.types import IndexCodec


def by_the_book(codec, data, kept, numel):
    """The documented codes, read one entry after the other."""
    data = bytes(data)
    if codec is IndexCodec.DENSE:
        return list(range(kept))
    if kept == 0:
        return []
    if codec is IndexCodec.BITMASK:
        return [place for place in range(numel) if data[place // 8] >> (7 - place % 8) & 1]
    if codec is IndexCodec.GAP8:
        place, found = -1, []
        for byte in data:
            place += 255 if byte == 255 else byte + 1
            found += [] if byte == 255 else [place]
        return found
    bits, count_bytes = {IndexCodec.BLOCK8: (8, 2), IndexCodec.BLOCK16: (16, 4)}[codec]
    width, found = bits // 8, []
    counts = data[kept * width :]
    for block in range(len(counts) // count_bytes):
        for _ in range(int.from_bytes(counts[block * count_bytes : (block + 1) * count_bytes], "little")):
            low = data[len(found) * width : (len(found) + 1) * width]
            found.append((block << bits) + int.from_bytes(low, "little"))
    return found


@st.composite
def positions(draw):
    numel = draw(st.sampled_from([0, 1, 7, 256, 257, 3000, 65_536, 200_001]))
    kept = min(numel, draw(st.integers(0, 3000)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()) or not kept:
        chosen = rng.choice(numel, kept, replace=False) if numel else np.empty(0, np.int64)
    else:  # runs, as rows of an embedding are
        chosen = (rng.integers(0, numel) + np.arange(kept)) % numel
    return numel, np.sort(chosen).astype(draw(st.sampled_from([np.int32, np.int64])))


@settings(max_examples=300, deadline=None)
@given(positions())
def test_every_code_is_read_back_by_us_and_by_the_book(case):
    numel, chosen = case
    codec, data = encode_positions(chosen, numel)
    assert by_the_book(codec, data, chosen.size, numel) == chosen.tolist()
    back = decode_positions(codec, data, chosen.size, numel)
    assert (codec is IndexCodec.DENSE) == (back is None) == (chosen.size == numel)
    if back is not None:
        assert back.dtype == np.int64
        assert np.array_equal(back, chosen)
    # never longer than the shortest of all codes, but for the tolerance
    escapes = (np.diff(chosen.astype(np.int64), prepend=-1) - 1) // 255
    sizes = (-(-numel // 8), chosen.size + int(escapes.sum()), 2 * chosen.size + 4 * -(-numel // 65_536))
    assert data.size <= 1.03 * min(sizes)


@pytest.mark.parametrize(
    ("numel", "kept", "codec"),
    [
        (100_000, 100_000, IndexCodec.DENSE),
        (100_000, 30_000, IndexCodec.BITMASK),
        (100_000, 13_000, IndexCodec.BITMASK),
        (100_000, 12_500, IndexCodec.GAP8),
        (100_000, 10_000, IndexCodec.GAP8),
        (100_000, 1_000, IndexCodec.GAP8),
        (1_000_000, 1_000, IndexCodec.BLOCK16),
        (100_000, 0, IndexCodec.GAP8),
    ],
)
def test_the_code_follows_the_density(numel, kept, codec):
    chosen = np.sort(np.random.default_rng(0).choice(numel, kept, replace=False))
    assert encode_positions(chosen, numel)[0] is codec


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20_000), st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(0, 2**32))
def test_several_codes_in_one_pass(numel, counts, seed):
    rng = np.random.default_rng(seed)
    several = [np.sort(rng.choice(numel, min(count, numel), replace=False)) for count in counts]
    gaps = [np.diff(one, prepend=-1) - 1 for one in several]
    codes = [b"".join(b"\xff" * (int(gap) // 255) + bytes([int(gap) % 255]) for gap in each) for each in gaps]
    parts = [np.frombuffer(code, np.uint8) for code in codes]
    scratch = np.full(sum(map(len, codes)) + 3, -7)
    for room in (None, scratch):
        found = decode_gaps(parts, [one.size for one in several], numel, room)
        assert np.array_equal(found, np.concatenate(several))


def test_more_escapes_than_are_cut_out_one_by_one():
    chosen = np.arange(0, 3_000_000, 1500)
    raw = b"".join(b"\xff" * 5 + bytes([1499 - 5 * 255]) for _ in chosen)
    data = np.frombuffer(raw, np.uint8)
    assert np.array_equal(decode_positions(IndexCodec.GAP8, data, chosen.size, 3_000_000), chosen + 1499)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765, 5000])
def test_the_ends_of_the_escape(gap):
    chosen = np.array([gap, 2 * gap + 1, 2 * gap + 2])
    for numel in (5 * gap + 40, 10**6):
        codec, data = encode_positions(chosen, numel)
        assert by_the_book(codec, data, 3, numel) == chosen.tolist()
        assert decode_positions(codec, data, 3, numel).tolist() == chosen.tolist()


def test_what_version_1_wrote_is_read():
    rng = np.random.default_rng(2)
    chosen = np.sort(rng.choice(5000, 400, replace=False))
    counts = np.bincount(chosen // 256, minlength=20).astype("<u2")
    data = np.concatenate([chosen.astype(np.uint8), counts.view(np.uint8)])
    assert by_the_book(IndexCodec.BLOCK8, data, 400, 5000) == chosen.tolist()
    assert decode_positions(IndexCodec.BLOCK8, data, 400, 5000).tolist() == chosen.tolist()


def test_positions_beyond_32_bits():
    chosen = np.array([5, 2**31, 2**31 + 3, 2**33])
    codec, data = encode_positions(chosen[:1], 2**20)
    assert codec is IndexCodec.BLOCK16 or data.size == 1
    gaps = np.diff(chosen, prepend=-1) - 1
    raw = b"".join(b"\xff" * (int(gap) // 255) + bytes([int(gap) % 255]) for gap in gaps)
    back = decode_positions(IndexCodec.GAP8, np.frombuffer(raw, np.uint8), 4, 2**33 + 1)
    assert back.tolist() == chosen.tolist()


@pytest.mark.parametrize(
    ("codec", "data", "kept", "numel"),
    [
        (IndexCodec.DENSE, [], 3, 4),
        (IndexCodec.DENSE, [1], 4, 4),
        (IndexCodec.BITMASK, [255, 255], 8, 8),
        (IndexCodec.BITMASK, [255], 7, 8),
        (IndexCodec.GAP8, [0, 1, 2], 2, 99),
        (IndexCodec.GAP8, [], 2, 99),
        (IndexCodec.GAP8, [255, 255], 2, 99),
        (IndexCodec.GAP8, [0, 255, 0], 2, 99),
        (IndexCodec.BLOCK8, [1, 2, 1, 0], 2, 99),
        (IndexCodec.BLOCK8, [1, 2, 2], 2, 99),
        (IndexCodec.BLOCK16, [1, 0, 255, 255, 255, 255], 1, 99),  # counts that would make an array of 32 GiB
        (IndexCodec.BLOCK16, [99, 0, 1, 0, 0, 0], 1, 99),
    ],
)
def test_parts_that_do_not_fit(codec, data, kept, numel):
    with pytest.raises(ValueError, match=r".+"):
        decode_positions(codec, np.array(data, np.uint8), kept, numel)
