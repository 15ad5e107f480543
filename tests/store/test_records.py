import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.store.records import EncodedStep, IdTable, check_ids, encode_step, record_crc
from lightning_unlearn.types import StepStatus

IDS = st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=8))


def step(**changes):
    plain = {"optimizer": 1, "sample_ids": (1, 2), "batch_size": 2, "seconds": 0.5, "status": StepStatus.STORED}
    return encode_step(**{**plain, **changes}, layers=[], compression=None)


@settings(deadline=None)
@given(st.lists(IDS, max_size=30), st.lists(IDS, max_size=5))
def test_a_table_gives_every_id_back(ids, others):
    table = IdTable.of(ids)
    assert len(table) == len(set(ids))
    codes = table.codes(ids)
    assert [table[code] for code in codes.tolist()] == ids
    for one, code in zip(others, table.codes(others).tolist(), strict=True):
        assert (code >= 0) == (one in ids)


def test_a_number_and_its_digits_are_two_ids():
    table = IdTable.of([7, "7", "s7", "i7"])
    assert len(table) == 4
    assert sorted(map(str, (table[code] for code in range(4)))) == ["7", "7", "i7", "s7"]


def test_codes_outside_the_table():
    with pytest.raises(ValueError, match="code 1 in a table of 1"):
        IdTable.of(["a"])[1]


@pytest.mark.parametrize("bad", [1.5, True, None, b"x", (1,)])
def test_ids_are_integers_or_strings(bad):
    with pytest.raises(ValueError, match="integers or strings"):
        check_ids([1, bad])


def test_numpy_integers_become_plain():
    assert [type(one) for one in check_ids([np.int32(3), np.str_("k")])] == [int, str]


CHANGES = [
    {"optimizer": 2},
    {"sample_ids": (2, 1)},
    {"sample_ids": (1, 2, 2)},
    {"sample_ids": ("1", "2")},
    {"batch_size": 3},
    {"seconds": 0.25},
    {"status": StepStatus.UNWATCHED},
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_checksum_covers_every_column(change):
    assert record_crc(0, step(), 0) != record_crc(0, step(**change), 0)


def test_the_checksum_covers_place_payload_and_entries():
    plain = step()
    assert record_crc(0, plain, 0) != record_crc(1, plain, 0)
    assert record_crc(0, plain, 0) != record_crc(0, plain, 1)
    entries = np.zeros(1, plain.entries.dtype)
    other = EncodedStep(1, (1, 2), 2, 0.5, StepStatus.STORED, entries, b"")
    assert record_crc(0, plain, 0) != record_crc(0, other, 0)


def test_the_checksum_separates_ids():
    assert record_crc(0, step(sample_ids=("ab", "c")), 0) != record_crc(0, step(sample_ids=("a", "bc")), 0)
