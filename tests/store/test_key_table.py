import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.store.key_table import KEY_BLOCK, KeyTable

IDS = st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=8))


@settings(deadline=None)
@given(st.lists(IDS, max_size=30), st.lists(IDS, max_size=5))
def test_a_table_gives_every_id_back(ids, others):
    table = KeyTable.of(ids)
    assert len(table) == len(set(ids))
    codes = table.codes(ids)
    assert [table[code] for code in codes.tolist()] == ids
    for one, code in zip(others, table.codes(others).tolist(), strict=True):
        assert (code >= 0) == (one in ids)


def test_a_number_and_its_digits_are_two_ids():
    table = KeyTable.of([7, "7", "s7", "i7"])
    assert len(table) == 4
    assert sorted(map(str, (table[code] for code in range(4)))) == ["7", "7", "i7", "s7"]


def test_codes_outside_the_table():
    with pytest.raises(ValueError, match="code 1 in a table of 1"):
        KeyTable.of(["a"])[1]


def large():
    return KeyTable.of(f"user-{one}" for one in range(5 * KEY_BLOCK))


def test_codes_ascend_with_the_texts():
    table = large()
    texts = [table.key(code) for code in range(len(table))]
    assert texts == sorted(texts)


@pytest.mark.parametrize("part", ["text", "offset"])
def test_a_damaged_block_is_found_when_it_is_needed_and_only_then(part):
    built = large()
    offsets, text = built.offsets.copy(), bytearray(built.text)
    place = 3 * KEY_BLOCK + 5
    if part == "text":
        text[int(offsets[place])] ^= 1
    else:
        offsets[place] += 1
    table = KeyTable(offsets, bytes(text), built.block_crcs())
    assert table[17] == built[17]
    with pytest.raises(ValueError, match="block 3 of the key table"):
        table[place + 40]
    with pytest.raises(ValueError, match="block 3"):
        table.codes([built[place]])
    with pytest.raises(ValueError, match="block 3"):
        table.check()
    assert KeyTable(offsets, bytes(text))[17] == built[17]


def test_offsets_beyond_the_text():
    built = large()
    offsets = built.offsets.copy()
    offsets[-1] += 1000
    with pytest.raises(ValueError, match="keys from byte"):
        KeyTable(offsets, built.text, built.block_crcs()).check()


def test_checked_blocks_are_remembered():
    built = large()
    checked = np.zeros(5, np.bool_)
    assert KeyTable(built.offsets, built.text, built.block_crcs(), checked)[0] == built[0]
    assert checked.tolist() == [True, False, False, False, False]
