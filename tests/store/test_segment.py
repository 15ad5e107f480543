import json
import struct

import numpy as np
import pytest
from safetensors import safe_open

from lightning_unlearn.store.records import encode_step
from lightning_unlearn.store.segment import Segment, build_segment
from lightning_unlearn.types import StepStatus

IDS = [(1, 2, 2), (), (5, -(2**31)), (3,)]
MIXED = [(1, "b"), ("a", "a", 2**80), (), ("ü",)]


def build(ids=IDS, start=10):
    steps = [
        encode_step(
            optimizer=i, sample_ids=one, batch_size=len(one), seconds=i / 4, status=StepStatus(i), layers=[],
            compression=None,
        )
        for i, one in enumerate(ids)
    ]  # fmt: skip
    return build_segment(steps, name="s", start=start, rank=1, store_id="id", compression=None)


@pytest.mark.parametrize("ids", [IDS, MIXED, [(2**40,)], [(2**63,)]])
def test_round_trip(ids):
    ref, chunks = build(ids)
    data = b"".join(chunks)
    assert (ref.start, ref.stop, ref.bytes) == (10, 10 + len(ids), len(data))
    segment = Segment(ref, data[: ref.head_bytes])
    for i, one in enumerate(ids):
        step = segment.step(i)
        assert (step.optimizer, step.sample_ids, step.batch_size, step.seconds) == (i, one, len(one), i / 4)
        assert step.status == i
        segment.check_record(i)


@pytest.mark.parametrize("ids", [IDS, MIXED])
def test_positions_and_distinct(ids):
    ref, chunks = build(ids)
    segment = Segment(ref, chunks[0])
    flat = [one for step in ids for one in step]
    for wanted in (flat[:1], flat, [99, "zz", 2**90], []):
        assert segment.positions(wanted).tolist() == [i for i, one in enumerate(flat) if one in wanted]
    assert set(segment.distinct(slice(None))) == set(flat)


def test_small_integers_take_four_bytes():
    ref, chunks = build(IDS)
    assert Segment(ref, chunks[0]).ids.dtype == np.int32
    ref, chunks = build([(2**31,)])
    assert Segment(ref, chunks[0]).ids.dtype == np.int64


def test_the_official_reader_opens_it(tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"".join(build(MIXED)[1]))
    with safe_open(path, "numpy") as file:
        assert file.metadata()["rank"] == "1"
        assert file.metadata()["store_id"] == "id"
        assert file.get_tensor("seconds").tolist() == [0, 0.25, 0.5, 0.75]
        assert file.get_tensor("payload").size == 0


def check_all(ref, head):
    segment = Segment(ref, head)
    for index in range(segment.n_steps):
        segment.check_record(index)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda head: head[:4],
        lambda head: head[:20],
        lambda head: struct.pack("<Q", 2**60) + head[8:],
        lambda head: head.replace(b'"seconds"', b'"secands"'),
        lambda head: head[:8] + b"[]" + b" " * (len(head) - 10),
        lambda head: head.replace(b'"F64"', b'"X64"'),
        lambda head: head[:-40],
    ],
)
def test_a_head_that_cannot_be_read(spoil):
    ref, chunks = build()
    with pytest.raises(ValueError, match=r".+"):
        check_all(ref, spoil(chunks[0]))


def test_the_number_of_steps_must_be_that_of_the_commit():
    ref, chunks = build()
    other = type(ref)(ref.name, ref.start, ref.stop + 1, ref.bytes, ref.head_bytes, ref.digest)
    with pytest.raises(ValueError, match="another length than 5 steps"):
        Segment(other, chunks[0])


def test_tensors_are_aligned():
    head = build(MIXED)[1][0]
    (length,) = struct.unpack_from("<Q", head)
    header = json.loads(head[8 : 8 + length])
    for name, info in header.items():
        if name != "__metadata__":
            width = {"F64": 8, "I64": 8, "I32": 4, "U32": 4, "U8": 1}[info["dtype"]]
            assert (8 + length + info["data_offsets"][0]) % width == 0, name
