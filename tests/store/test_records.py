import numpy as np
import pytest

from lightning_unlearn.store.records import EncodedStep, check_ids, encode_step, ids_bytes, record_crc, record_numbers
from lightning_unlearn.types import StepStatus


def step(**changes):
    plain = {"optimizer": 1, "sample_ids": (1, 2), "batch_size": 2, "seconds": 0.5, "status": StepStatus.STORED}
    return encode_step(**{**plain, **changes}, layers=[], compression=None)


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
    {"pruning_error": 0.5},
    {"rounding_error": 0.5},
    {"edited": True},
]


def crc(ordinal, one, payload_crc):
    numbers = record_numbers(ordinal, one)
    return record_crc(numbers, ids_bytes(one.sample_ids), one.entries.tobytes(), payload_crc)


@pytest.mark.parametrize("change", CHANGES)
def test_the_checksum_covers_every_column(change):
    assert crc(0, step(), 0) != crc(0, step(**change), 0)


def test_the_checksum_covers_place_payload_and_entries():
    plain = step()
    assert crc(0, plain, 0) != crc(1, plain, 0)
    assert crc(0, plain, 0) != crc(0, plain, 1)
    entries = np.zeros(1, plain.entries.dtype)
    other = EncodedStep(1, (1, 2), 2, 0.5, StepStatus.STORED, entries, b"")
    assert crc(0, plain, 0) != crc(0, other, 0)


def test_the_checksum_separates_ids():
    assert crc(0, step(sample_ids=("ab", "c")), 0) != crc(0, step(sample_ids=("a", "bc")), 0)
