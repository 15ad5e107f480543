import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open

from lightning_unlearn.store.records import ENTRY, EncodedStep, encode_step
from lightning_unlearn.store.segment import build_segment
from lightning_unlearn.store.segment_reader import Segment
from lightning_unlearn.store.segment_tensors import SegmentTensors
from lightning_unlearn.types import StepStatus

IDS = [(1, 2, 2), (), (5, -(2**31)), (3,)]
MIXED = [(1, "b"), ("a", "a", 2**80), (), ("ü",)]


def build(ids=IDS, start=10):
    steps = [
        encode_step(
            optimizer=i, sample_ids=one, batch_size=len(one), seconds=i / 4, status=StepStatus(i), layers=[],
            compression=None, pruning_error=i / 8, rounding_error=i / 16, edited=i == 1,
        )
        for i, one in enumerate(ids)
    ]  # fmt: skip
    return build_segment(steps, name="s", start=start, rank=1, store_id="id", compression=None)


def opened(built, **options):
    ref, chunks = built
    data = memoryview(b"".join(chunks))
    return Segment(ref, data[: ref.head_bytes], lambda start, stop: data[start:stop], **options)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("ids", [IDS, MIXED, [(2**40,)], [(2**63,)], [()]])
def test_round_trip(ids, at_once):
    ref, chunks = build(ids)
    data = b"".join(chunks)
    assert (ref.start, ref.stop, ref.bytes, ref.payload_bytes) == (10, 10 + len(ids), len(data), 0)
    segment = opened((ref, chunks), at_once=at_once)
    for i, one in enumerate(ids):
        step = segment.step(i)
        assert (step.optimizer, step.sample_ids, step.batch_size, step.seconds) == (i, one, len(one), i / 4)
        assert step.status == i
        assert (step.pruning_error, step.rounding_error, step.edited) == (i / 8, i / 16, i == 1)
    assert list(segment.damaged_parts()) == []


@pytest.mark.parametrize("name", ["ids", "entries", "index.steps"])
def test_no_slice_reaches_into_the_next_tensor(name):
    ref, chunks = build()
    data = memoryview(b"".join(chunks))
    tensors = SegmentTensors(data[: ref.head_bytes], lambda start, stop: data[start:stop])
    n = tensors.length(name)
    start, stop = tensors.span(name)
    assert tensors.whole(name) == tensors.slice(name, 0, n) == data[start:stop]
    assert len(tensors.slice(name, n, n)) == 0
    for first, last, width in ((0, n + 1, 1), (n + 1, n + 1, 1), (-1, 0, 1), (1, 0, 1), (0, n // 2 + 1, 2)):
        with pytest.raises(ValueError, match=f"{name} from {first} to {last}"):
            tensors.slice(name, first, last, width)


def test_errors_that_were_not_measured_are_nan():
    step = encode_step(
        optimizer=0, sample_ids=(), batch_size=0, seconds=0.0, status=StepStatus.STORED, layers=[], compression=None
    )
    read = opened(build_segment([step], name="s", start=0, rank=0, store_id="", compression=None)).step(0)
    assert np.isnan([read.pruning_error, read.rounding_error]).all()
    assert read.edited is False


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("ids", [IDS, MIXED])
def test_occurrences_and_distinct(ids, at_once):
    segment = opened(build(ids), at_once=at_once)
    flat = [one for step in ids for one in step]
    for wanted in (flat[:1], flat, [99, "zz", 2**90], []):
        codes, steps = segment.lookup.occurrences(wanted)
        found = list(zip(segment.lookup.decode(codes), steps.tolist(), strict=True))
        want = [(one, i) for i, step in enumerate(ids) for one in step if one in wanted]
        assert sorted(found, key=str) == sorted(want, key=str)
    assert set(segment.lookup.decode(segment.distinct())) == set(flat)
    for mask in ([True, False, False, True], [False] * 4, [True] * 4):
        want = {one for take, step in zip(mask, ids, strict=True) if take for one in step}
        assert set(segment.lookup.decode(segment.distinct(np.array(mask)))) == want


def test_small_integers_take_four_bytes():
    assert opened(build(IDS)).codes(0).dtype == np.int32
    assert opened(build([(2**31,)])).codes(0).dtype == np.int64


def test_the_official_reader_opens_it(tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"".join(build(MIXED)[1]))
    with safe_open(path, "numpy") as file:
        assert file.metadata()["rank"] == "1"
        assert file.metadata()["store_id"] == "id"
        assert file.get_tensor("seconds").tolist() == [0, 0.25, 0.5, 0.75]
        assert file.get_tensor("payload").size == 0


class Counting:
    """Reads a file and knows what was read."""

    def __init__(self, chunks):
        self.data, self.spans = memoryview(b"".join(chunks)), []

    def __call__(self, start, stop):
        self.spans.append((start, stop))
        return self.data[start:stop]

    @property
    def bytes(self):
        return sum(stop - start for start, stop in self.spans)


def many():
    rng = np.random.default_rng(0)
    return build_segment(
        [
            EncodedStep(0, tuple(rng.integers(0, 10**9, 64).tolist()), 64, 0.0, StepStatus.STORED,
                        np.empty(0, ENTRY), b"")
            for _ in range(2000)
        ],
        name="s", start=0, rank=0, store_id="", compression=None,
    )  # fmt: skip


def test_opening_reads_the_head_and_a_look_up_reads_a_few_blocks():
    ref, chunks = many()
    read = Counting(chunks)
    segment = Segment(ref, read.data[: ref.head_bytes], read)
    assert ref.head_bytes < ref.body_bytes / 10
    assert read.spans == []
    asked = segment.codes(7).tolist()[0]
    read.spans.clear()
    assert 7 in segment.lookup.occurrences([asked])[1]
    assert read.bytes <= 2 * 8 * 1024
    remote = Segment(ref, read.data[: ref.head_bytes], read, at_once=True)
    read.spans.clear()
    assert 7 in remote.lookup.occurrences([asked])[1]
    assert len(read.spans) == 1
    read.spans.clear()
    assert asked in segment.step(7).sample_ids
    assert read.bytes <= 64 * 4


@pytest.mark.parametrize("keys", [False, True])
def test_every_flipped_bit_behind_the_head_is_found(keys):
    ref, chunks = build(MIXED if keys else IDS)
    whole = b"".join(chunks)
    for place in range(ref.head_bytes, len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            found = memoryview(data)
            segment = Segment(ref, found[: ref.head_bytes], lambda start, stop, found=found: found[start:stop])
            damaged = bool(list(segment.damaged_parts()))
            for index in range(segment.n_steps):
                try:
                    step = segment.step(index, segment.payload(index))
                    assert step.sample_ids == (MIXED if keys else IDS)[index]
                except ValueError:
                    damaged = True
            assert damaged, (place, bit)


def test_an_index_whose_fences_are_altered_is_named_although_the_head_is_not_trusted():
    ref, chunks = build()
    data = bytearray(b"".join(chunks))
    start, _ = SegmentTensors(data[: ref.head_bytes], lambda *_: b"").span("index.fence")
    data[start] ^= 1
    found = memoryview(data)
    segment = Segment(ref, found[: ref.head_bytes], lambda start, stop: found[start:stop], check=False)
    assert list(segment.damaged_parts()) == ["id index"]


def check_all(ref, head, body):
    data = memoryview(bytes(head) + b"".join(body))
    segment = Segment(ref, head, lambda start, stop: data[start:stop])
    for index in range(segment.n_steps):
        segment.step(index)


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
        check_all(ref, spoil(chunks[0]), chunks[1:])


def test_the_number_of_steps_must_be_that_of_the_commit():
    ref, chunks = build()
    with pytest.raises(ValueError, match="another length than 5 steps"):
        opened((replace(ref, stop=ref.stop + 1), chunks))


def test_tensors_are_aligned():
    head = build(MIXED)[1][0]
    (length,) = struct.unpack_from("<Q", head)
    header = json.loads(head[8 : 8 + length])
    for name, info in header.items():
        if name != "__metadata__":
            width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "U8": 1}[info["dtype"]]
            assert (8 + length + info["data_offsets"][0]) % width == 0, name
