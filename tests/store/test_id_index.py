import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.store.id_index import INDEX_BLOCK, IdIndex, index_columns


def opened(columns, spoil=None):
    ids, steps = columns.ids.copy(), columns.steps.copy()
    if spoil is not None:
        spoil(ids, steps)
    blocks = []

    def read(array):
        def slices(start, stop):
            blocks.append((start // INDEX_BLOCK, -(-stop // INDEX_BLOCK)))
            return array[start:stop].tobytes()

        return slices

    index = IdIndex(columns.fences, columns.crc32, len(ids), ids.dtype, read(ids), read(steps))
    return index, blocks


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0, 1, INDEX_BLOCK - 1, INDEX_BLOCK, INDEX_BLOCK + 1, 5000]),
    st.sampled_from([1, 3, 40, 4000, 2**30]),
    st.booleans(),
)
def test_against_a_plain_search(seed, count, span, wide):
    rng = np.random.default_rng(seed)
    ids = rng.integers(-span, span, count).astype(np.int64 if wide else np.int32)
    if wide and count:
        ids[0], ids[-1] = 2**63 - 1, -(2**63)
    elif count:
        ids[0], ids[-1] = 2**31 - 1, -(2**31)
    counts = np.bincount(rng.integers(0, 50, count), minlength=50)
    index, _ = opened(index_columns(ids, counts))
    steps = np.repeat(np.arange(50), counts)
    bounds = np.iinfo(ids.dtype)
    asked = np.unique(np.concatenate([rng.choice(ids, min(count, 20)), rng.integers(-span, span, 20)]).astype(np.int64))
    for wanted in (asked, asked[:1], np.array([bounds.min, bounds.max]), np.empty(0, np.int64), np.unique(ids)):
        found, places = index.find(wanted.astype(np.int64))
        mask = np.isin(ids, wanted)
        want = np.lexsort((steps[mask], ids[mask]))
        assert np.array_equal(found, ids[mask][want])
        assert np.array_equal(places, steps[mask][want])
    scanned = list(index.scan())
    assert sum(len(one) for one, _ in scanned) == count
    assert index.damaged_blocks() == []


def test_only_the_blocks_that_are_needed_are_read_and_checked():
    ids = np.arange(100 * INDEX_BLOCK, dtype=np.int32)

    def spoil(ids, steps):
        steps[50 * INDEX_BLOCK + 7] ^= 1
        ids[70 * INDEX_BLOCK + 7] ^= 1

    index, blocks = opened(index_columns(ids, np.full(INDEX_BLOCK, 100)), spoil)
    assert index.find(np.array([5, 10 * INDEX_BLOCK + 3]))[0].tolist() == [5, 10 * INDEX_BLOCK + 3]
    assert set(blocks) == {(0, 1), (10, 11)}
    for block in (50, 70):
        with pytest.raises(ValueError, match=f"block {block} of the id index"):
            index.find(np.array([block * INDEX_BLOCK + 9]))
    with pytest.raises(ValueError, match="block 50"):
        list(index.scan())
    assert index.damaged_blocks() == [50, 70]


def test_an_id_that_fills_several_blocks_and_one_that_begins_a_block():
    ids = np.sort(np.concatenate([np.full(3 * INDEX_BLOCK, 7), np.arange(8, 8 + INDEX_BLOCK)])).astype(np.int32)
    index, blocks = opened(index_columns(ids, np.array([len(ids)])))
    assert len(index.find(np.array([7]))[0]) == 3 * INDEX_BLOCK
    blocks.clear()
    assert index.find(np.array([8]))[0].tolist() == [8]
    assert blocks[0] == (2, 4)  # it might have begun in the block before the one that it heads
