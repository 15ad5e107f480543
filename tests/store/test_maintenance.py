"""Damage is named, never read; repairs lose only what is damaged; purged people are gone byte for byte."""

import errno
import random
import re
import secrets
import uuid
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from lightning_unlearn.exceptions import MissingDeltaError, StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.opening import load_segment
from lightning_unlearn.store.salvage import salvage_segment
from lightning_unlearn.types import StepStatus
from lightning_unlearn.utilities.files import Files
from tests.helpers.stores import Plain, Steps, holds_step, make_store, tensor_span

N_STEPS = 9
STEPS = Steps(keys=True)


def recorded(url, **settings):
    store = make_store(url, **settings)
    with store.writer() as writer:
        for count in (4, 5):
            STEPS.fill(writer, count)
            writer.flush()
    return DeltaStore.open(url)


def segment_path(store, step):
    return next(
        (Path(store.url) / "rank-00000" / ref.name, ref)
        for ref in store.reader.commits[0].segments
        if ref.start <= step < ref.stop
    )


def flip(path, place, bit=3):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def never_wrong(store, gone=()):
    """Every step reads as it was appended, or says that it is damaged; returns the steps that do."""
    damaged = []
    for step in range(N_STEPS):
        try:
            assert holds_step(store, step, STEPS[step])
        except StoreCorruptedError:
            damaged.append(step)
    return damaged


def test_an_intact_store(tmp_path):
    report = recorded(tmp_path / "s").verify()
    assert report.ok
    assert (report.files, report.steps, report.orphans, report.damages) == (6, N_STEPS, (), ())
    assert "nothing damaged" in str(report)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_flipped_bit_of_a_delta_costs_that_step(tmp_path, compression):
    store = recorded(tmp_path / "s", compression=compression)
    path, ref = segment_path(store, 6)
    segment = load_segment(store.files, "rank-00000", ref)
    start, stop = segment.payload_span(6 - ref.start)
    flip(path, (start + stop) // 2)
    with pytest.raises(StoreCorruptedError, match=rf"{ref.name}.*step 6.*repair"):
        store.read(6)
    assert never_wrong(store) == [6]
    report = store.verify()
    assert not report.ok
    assert report.damaged_steps == (6,)
    assert report.damages[0].lost_ids == ()
    assert report.damages[0].file == f"rank-00000/{ref.name}"
    assert store.repair() == report
    assert store.verify().ok
    repaired = DeltaStore.open(store.url)
    assert all(holds_step(repaired, s, STEPS[s], StepStatus.LOST if s == 6 else StepStatus.STORED) for s in range(9))
    with pytest.raises(MissingDeltaError, match="damaged"):
        repaired.read(6)
    assert repaired.lost_ids([(0, 9)]) == 0


def damage(store, step, name, place):
    """Flip a bit of a tensor of the segment that holds a step; `place` counts from the tensor's start."""
    path, ref = segment_path(store, step)
    start, stop = tensor_span(path, name)
    assert 0 <= place < stop - start
    flip(path, start + place, bit=0)
    return ref


def test_a_flipped_bit_of_the_ids_costs_their_order_and_the_delta(tmp_path):
    store = recorded(tmp_path / "s")
    ref = segment_path(store, 2)[1]
    place = int(load_segment(store.files, "rank-00000", ref).ids_offset[2])
    damage(store, 2, "ids", 4 * place)
    assert never_wrong(DeltaStore.open(store.url)) == [2]
    report = store.verify()
    assert report.damaged_steps == (2,)
    assert report.damages[0].lost_ids == ()
    assert "(id index, ids)" in str(report) or "(ids)" in str(report)
    store.repair()
    repaired = DeltaStore.open(store.url)
    assert repaired.verify().ok
    # the id index knew them a second time
    assert Counter(repaired.record(2).sample_ids) == Counter(STEPS[2]["sample_ids"])
    assert all(2 in repaired.steps_of([one]) for one in STEPS[2]["sample_ids"])
    assert repaired.record(2).status is StepStatus.LOST
    assert repaired.lost_ids([(0, 9)]) == 0
    assert all(holds_step(repaired, step, STEPS[step]) for step in range(9) if step != 2)


def test_ids_and_their_index_both_damaged_cost_that_steps_record(tmp_path):
    store = recorded(tmp_path / "s")
    ref = segment_path(store, 2)[1]
    place = int(load_segment(store.files, "rank-00000", ref).ids_offset[2])
    damage(store, 2, "ids", 4 * place)
    damage(store, 2, "index.ids", 0)
    report = store.verify()
    assert report.damaged_steps == report.damages[0].lost_ids == (2,)
    store.repair()
    repaired = DeltaStore.open(store.url)
    assert repaired.verify().ok
    assert repaired.record(2).sample_ids == ()
    assert repaired.record(2).status is StepStatus.LOST
    assert repaired.lost_ids([(0, 9)]) == 1
    assert all(holds_step(repaired, step, STEPS[step]) for step in range(9) if step != 2)


def test_a_flipped_bit_of_a_layers_description_costs_the_delta_and_no_id(tmp_path):
    store = recorded(tmp_path / "s")
    damage(store, 6, "entries", 2 * 4 * 38 + 5)  # the third step of the segment
    assert never_wrong(DeltaStore.open(store.url)) == [6]
    report = store.verify()
    assert (report.damaged_steps, report.damages[0].lost_ids) == ((6,), ())
    assert "(layers)" in str(report)
    store.repair()
    repaired = DeltaStore.open(store.url)
    assert repaired.verify().ok
    assert all(holds_step(repaired, s, STEPS[s], StepStatus.LOST if s == 6 else StepStatus.STORED) for s in range(9))


@pytest.mark.parametrize("name", ["index.ids", "index.steps"])
def test_a_damaged_id_index_costs_nothing(tmp_path, name):
    store = recorded(tmp_path / "s")
    ref = damage(store, 6, name, 9)
    assert never_wrong(DeltaStore.open(store.url)) == []
    asked = STEPS[6]["sample_ids"][:1]
    for ask in (store.steps_of, store.unseen):
        with pytest.raises(StoreCorruptedError, match=rf"{ref.name}.*id index.*steps 4 to 8"):
            ask(asked)
    with pytest.raises(StoreCorruptedError, match="repair"):
        store.purge(asked)
    report = store.verify()
    assert not report.ok
    assert report.damaged_steps == ()
    assert "(id index)" in str(report)
    store.repair()
    repaired = DeltaStore.open(store.url)
    assert repaired.verify().ok
    assert never_wrong(repaired) == []
    assert 6 in repaired.steps_of(asked)


@pytest.mark.parametrize("name", ["index.fence", "index.crc32", "key.crc32", "padding", "seconds", "kept"])
def test_a_damaged_head_is_not_read_and_costs_only_what_no_record_confirms(tmp_path, name):
    store = make_store(tmp_path / "s")
    with store.writer() as writer:
        STEPS.fill(writer, 9)
    store.refresh()
    damage(store, 0, name, 0)
    with pytest.raises(StoreCorruptedError, match="the head does not fit"):
        DeltaStore.open(store.url).record(5)
    report = store.verify()
    lost = (0,) if name in ("seconds", "kept") else ()
    assert (report.damaged_steps, report.damages[0].lost_ids) == (lost, lost)
    assert "(head" in str(report)
    store.repair()
    repaired = DeltaStore.open(store.url)
    assert repaired.verify().ok
    assert all(holds_step(repaired, step, STEPS[step]) for step in range(9) if step not in lost)
    assert all(1 in repaired.steps_of([one]) for one in STEPS[1]["sample_ids"])


def test_a_damaged_key_costs_the_steps_that_use_it(tmp_path):
    store = recorded(tmp_path / "s")
    path, ref = segment_path(store, 6)
    key = next(one for one in STEPS[6]["sample_ids"] if isinstance(one, str))
    users = [step for step in range(ref.start, ref.stop) if key in STEPS[step]["sample_ids"]]
    assert 6 in users
    assert len(users) < 5
    place = path.read_bytes().index(f"s{key}".encode()) - tensor_span(path, "key.text")[0]
    damage(store, 6, "key.text", place + 3)
    report = store.verify()
    assert report.damaged_steps == report.damages[0].lost_ids == tuple(users)
    assert "key table" in str(report)
    store.repair()
    repaired = DeltaStore.open(store.url)
    assert repaired.verify().ok
    assert all(holds_step(repaired, step, STEPS[step]) for step in range(9) if step not in users)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_bits_flipped_anywhere_give_no_wrong_number(tmp_path, compression):
    intact = recorded(tmp_path / "s", compression=compression)
    files = [path for path in Path(intact.url).rglob("*") if path.is_file() and path.suffix != ".lock"]
    rng = random.Random(0)
    kinds = set()
    for path in files:
        whole = path.read_bytes()
        for _ in range(40):
            flip(path, rng.randrange(len(whole)), rng.randrange(8))
            kinds.add(outcome(intact.url, path.name))
            path.write_bytes(whole)
    assert kinds - {"harmless"} == {"not opened", "steps lost", "weights lost", "index lost"}


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_files_cut_short_give_no_wrong_number(tmp_path, fraction):
    intact = recorded(tmp_path / "s")
    for path in [path for path in Path(intact.url).rglob("*") if path.is_file() and path.suffix != ".lock"]:
        whole = path.read_bytes()
        path.write_bytes(whole[: min(int(fraction * len(whole)), len(whole) - 1)])
        assert outcome(intact.url, path.name) != "harmless"
        path.unlink()
        assert outcome(intact.url, path.name) != "harmless"
        path.write_bytes(whole)
    assert intact.verify().ok


def outcome(url, name):
    """What a damaged store does; fails where it gives back something that was not appended."""
    try:
        store = DeltaStore.open(url)
    except (StoreCorruptedError, StoreMismatchError):
        return "not opened"
    lost = never_wrong(store)
    report = store.verify()
    try:
        asked = "user-0003"
        want = [step for step in range(N_STEPS) if asked in STEPS[step]["sample_ids"]]
        assert store.steps_of([asked]).tolist() == want
    except StoreCorruptedError:
        assert name in str(report)
        if not lost:
            return "index lost"
    if lost:
        assert set(report.damaged_steps) <= set(lost)
        assert name in str(report)
        return "steps lost"
    try:
        store.initial_weights()
    except StoreCorruptedError:
        assert name in str(report)
        assert not report.damages[0].repairable
        return "weights lost"
    return "harmless"


def test_a_lost_file_costs_its_steps(tmp_path):
    store = recorded(tmp_path / "s")
    path, ref = segment_path(store, 5)
    path.unlink()
    report = store.verify()
    assert report.damaged_steps == tuple(range(ref.start, ref.stop))
    assert "missing" in str(report)
    store.repair()
    assert store.verify().ok
    assert all(holds_step(store, step, STEPS[step]) for step in range(ref.start))
    assert store.statuses(range(9)).tolist() == [0] * 4 + [StepStatus.LOST] * 5
    assert store.lost_ids([(0, 6)]) == 2


def test_a_truncated_file_costs_the_steps_behind_the_cut(tmp_path):
    store = recorded(tmp_path / "s")
    path, ref = segment_path(store, 5)
    path.write_bytes(path.read_bytes()[: ref.bytes - 10])
    report = store.verify()
    assert "truncated" in str(report)
    assert report.damaged_steps == (8,)
    store.repair()
    assert all(holds_step(store, step, STEPS[step]) for step in range(8))
    assert holds_step(store, 8, STEPS[8], StepStatus.LOST)
    with store.writer() as writer:
        assert writer.n_steps == 9
        STEPS.fill(writer, 1)
    store.refresh()
    assert holds_step(store, 9, STEPS[9])


def test_orphans_are_no_damage_and_the_next_writer_removes_them(tmp_path):
    store = recorded(tmp_path / "s")
    store.files.publish("rank-00000/segment-99999999-x.safetensors", b"left by a crash")
    report = store.verify()
    assert report.ok
    assert report.orphans == ("rank-00000/segment-99999999-x.safetensors",)
    store.writer().close()
    assert store.verify().orphans == ()


@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_a_damaged_commit_is_found_again_from_the_segments(tmp_path, how):
    store = recorded(tmp_path / "s")
    path = next((tmp_path / "s" / "rank-00000").glob("commit-*.json"))
    flip(path, 300) if how == "flipped" else path.unlink()
    with pytest.raises(StoreCorruptedError, match=r"commit|rank-00000"):
        DeltaStore.open(store.url)
    with pytest.raises(StoreCorruptedError, match=r"commit|rank-00000"):
        store.writer()  # it would call the segments orphans
    damaged = DeltaStore.open(store.url, check=False)
    assert [(damage.file, damage.repairable) for damage in damaged.verify().damages] == [("rank-00000", True)]
    damaged.repair()
    assert DeltaStore.open(store.url).verify().ok
    assert never_wrong(DeltaStore.open(store.url)) == []
    with store.writer() as writer:
        assert writer.n_steps == N_STEPS


def test_a_damaged_commit_over_damaged_segments_is_left_alone(tmp_path):
    store = recorded(tmp_path / "s")
    path = next((tmp_path / "s" / "rank-00000").glob("commit-*.json"))
    flip(path, 300)
    segment_path(store, 1)[0].unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "s" / "rank-00000").iterdir()}
    report = DeltaStore.open(store.url, check=False).repair()
    assert "cannot be repaired" in str(report)
    assert {path: path.read_bytes() for path in (tmp_path / "s" / "rank-00000").iterdir()} == before


# --- purge --------------------------------------------------------------------------------------------------------


def everything(store):
    """All bytes of a store: raw, and every payload decompressed."""
    for path in sorted(Path(store.url).rglob("*")):
        if path.is_file():
            yield path.read_bytes()
    for rank, segments in enumerate(store.reader.segments):
        for segment in segments:
            for index in range(segment.n_steps):
                payload = store.files.read(f"rank-{rank:05d}/{segment.ref.name}", *segment.payload_span(index))
                if payload and segment.compression:
                    yield zstandard.ZstdDecompressor().decompress(payload)
                    yield b"".join(
                        part.values.numpy().tobytes() for part in store.read(segment.ref.start + index).values()
                    )


def needles(one):
    """An id as it may stand in a file: its text, its digits, its bytes in both orders."""
    if isinstance(one, str):
        return [one.encode()]
    return [str(one).encode(), one.to_bytes(8, "little"), one.to_bytes(8, "big")]


@pytest.mark.parametrize("kind", ["key", "number"])
@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_purge_leaves_no_byte(tmp_path, compression, world_size, kind):
    store = make_store(tmp_path / "s", compression=compression, world_size=world_size)
    # random 16-byte keys, and integers of 63 bits, none of which has a byte sequence by chance
    keys = [secrets.token_hex(16) if kind == "key" else secrets.randbits(62) | 2**62 for _ in range(12)]
    steps = [{**STEPS[step], "sample_ids": [keys[step], keys[step + 1], keys[step]]} for step in range(8)]
    for rank in range(world_size):
        with store.writer(rank, segment_bytes=4000) as writer:
            for step in steps:
                mine = [delta for delta in step["deltas"] if delta.layer % world_size == rank]
                writer.append(**{**step, "deltas": mine})
    store.refresh()
    secret_keys = {keys[3], keys[6]}
    subtracted = {2, 3, 5}
    values = {
        step: max((delta.values for delta in steps[step]["deltas"]), key=len).numpy().tobytes() for step in range(8)
    }

    def occurrences(needle):
        return sum(needle in haystack for haystack in everything(store))

    def found(key):
        return sum(occurrences(needle) for needle in needles(key)) > 0

    assert all(found(key) for key in keys[:9])
    assert all(occurrences(value) for value in values.values())
    store.purge(secret_keys, subtracted)
    assert [found(key) for key in keys[:9]] == [key not in secret_keys for key in keys[:9]]
    assert [occurrences(value) > 0 for value in values.values()] == [step not in subtracted for step in range(8)]
    assert store.verify().ok
    assert store.steps_of(secret_keys).size == 0
    assert store.unseen(keys[:9]) == [key for key in keys[:9] if key in secret_keys]
    for step in range(8):
        left = tuple(one for one in steps[step]["sample_ids"] if one not in secret_keys)
        status = StepStatus.PURGED if step in subtracted else StepStatus.STORED
        want = {**steps[step], "sample_ids": left * world_size, "batch_size": 4 * world_size}
        assert holds_step(store, step, want, status)
    names = store.files.names("rank-00000")
    store.purge(secret_keys, subtracted)  # nothing is left to do
    segments = [name for name in names if name.startswith("segment")]
    assert [name for name in store.files.names("rank-00000") if name.startswith("segment")] == segments


def anchored(url, ranks=1):
    """Eight steps; weights are kept after the third and the sixth of each rank."""
    store = make_store(url, world_size=ranks)
    for rank in range(ranks):
        with store.writer(rank) as writer:
            for step in range(8):
                mine = [delta for delta in STEPS[step]["deltas"] if delta.layer % ranks == rank]
                one = f"only-{step}" if rank == 0 else "others"
                writer.append(**{**STEPS[step], "deltas": mine, "sample_ids": [one]})
                if step in (2, 5):
                    writer.anchor(dict(Plain().named_parameters()), None, None)
    store.refresh()
    assert store.anchors == [3, 6]
    return store


@pytest.mark.parametrize(
    ("ids", "steps", "left"),
    [
        ([], {7}, [3, 6]),
        ([], {6}, [3, 6]),  # the first `step` steps are in an anchor, and step 6 is behind them
        ([], {5, 7}, [3]),
        (["only-4"], set(), [3]),
        (["only-2"], {7}, []),
        (["others"], {7}, []),
        (["nobody"], set(), [3, 6]),
    ],
)
def test_a_purge_drops_the_anchors_that_have_learnt(tmp_path, ids, steps, left):
    ranks = 2
    store = anchored(tmp_path / "s", ranks)
    store.purge(ids, steps)
    store.refresh()
    assert store.anchors == left
    files = sorted(path.name[:15] for path in (tmp_path / "s").rglob("anchor-*"))
    assert files == sorted([f"anchor-{step:08d}" for step in left] * ranks)
    report = store.verify()
    assert report.ok
    assert report.orphans == ()
    assert all(store.read_anchor(step).weights is not None for step in left)


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_anchor_is_named_and_dropped_alone(tmp_path, how):
    store = anchored(tmp_path / "s")
    assert store.verify().ok
    path = next((tmp_path / "s" / "rank-00000").glob("anchor-00000003-*"))
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flip(path, path.stat().st_size // 2)
    report = store.verify()
    assert [damage.file for damage in report.damages] == [f"rank-00000/{path.name}"]
    assert "(anchor)" in str(report)
    assert report.damaged_steps == ()
    store.repair()
    store.refresh()
    assert store.anchors == [6]
    assert store.verify().ok
    assert store.verify().orphans == ()


def test_a_purge_needs_the_store_for_itself(tmp_path):
    store = recorded(tmp_path / "s")
    with store.writer(), pytest.raises(StoreMismatchError, match="another writer"):
        store.purge([1])
    store.purge([1])


def test_a_purge_stops_at_damage(tmp_path):
    store = recorded(tmp_path / "s")
    path, _ = segment_path(store, 6)
    flip(path, path.stat().st_size - 5)
    asked = next(one for one in STEPS[6]["sample_ids"])
    with pytest.raises(StoreCorruptedError, match="repair"):
        store.purge([asked])
    store.repair()
    store.purge([asked])
    assert store.steps_of([asked]).size == 0


def test_a_purge_in_memory_reaches_ids_that_only_one_rank_has():
    store = make_store(f"memory://{uuid.uuid4().hex}", world_size=2)
    with store.writer(0) as writer:
        STEPS.fill(writer, 2)
    store.refresh()
    assert store.n_steps == 0
    asked = STEPS[1]["sample_ids"][0]
    assert asked in store.reader.distinct_ids()
    store.purge([asked])
    assert asked not in store.reader.distinct_ids()


READING = {
    "delta": lambda store: store.reader.read(5),
    "record": lambda store: store.reader.record(5),
    "steps of an id": lambda store: store.steps_of([STEPS[1]["sample_ids"][0]]),
    "weights at the start": lambda store: store.initial_weights(),
    "anchor": lambda store: store.read_anchor(4),
    "merge": lambda store: store.compact(),
    "purge": lambda store: store.purge([STEPS[1]["sample_ids"][0]], [1]),
    "cut": lambda store: store.writer().truncate(3),
}


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), PermissionError("denied")])
@pytest.mark.parametrize("reading", READING)
@pytest.mark.parametrize("where", ["local", "memory"])
def test_what_cannot_be_read_for_the_moment_is_not_called_damaged(tmp_path, monkeypatch, reading, where, error):
    store = make_store(tmp_path / "s" if where == "local" else f"memory://{uuid.uuid4().hex}")
    with store.writer() as writer:
        STEPS.fill(writer, 4)
        writer.anchor(dict(Plain().named_parameters()), [], None)
        STEPS.fill(writer, 5)
        writer.flush()
    store = DeltaStore.open(store.url)

    def unreachable(method):
        def fail(files, name, *args):
            if name.endswith(".safetensors"):
                raise error
            return method(files, name, *args)

        return fail

    with monkeypatch.context() as context:
        for name in ("read", "view"):
            context.setattr(Files, name, unreachable(getattr(Files, name)))
        with pytest.raises(OSError, match=re.escape(str(error))) as raised:
            READING[reading](store)
        assert not isinstance(raised.value, StoreCorruptedError)
    store = DeltaStore.open(store.url)
    assert store.verify().ok
    assert not never_wrong(store)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), PermissionError("denied"), OSError()])
@pytest.mark.parametrize("what", ["segment", "anchor", "commit", "initial"])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_what_cannot_be_read_for_the_moment_is_not_given_up(tmp_path, monkeypatch, what, where, error):
    store = make_store(tmp_path / "s" if where == "local" else f"memory://{uuid.uuid4().hex}")
    with store.writer() as writer:
        STEPS.fill(writer, 4)
        writer.anchor(dict(Plain().named_parameters()), [], None)
        STEPS.fill(writer, 5)
    store.refresh()

    def unreachable(method):
        def fail(files, name, *args):
            if name.rpartition("/")[2].startswith(what):
                raise error
            return method(files, name, *args)

        return fail

    with monkeypatch.context() as context:
        for name in ("read", "view"):
            context.setattr(Files, name, unreachable(getattr(Files, name)))
        report = store.repair()
        assert not report.ok
        assert not any(damage.repairable for damage in report.damages)
        assert not report.damaged_steps
    store.refresh()
    assert store.verify().ok
    assert store.anchors == [4]
    assert not never_wrong(store)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_what_cannot_be_read_any_more_as_it_is_repaired_is_not_given_up(tmp_path, monkeypatch, where):
    """The damage is seen, and then the disk goes away: the steps that are intact must not be taken for gone."""
    store = make_store(tmp_path / "s" if where == "local" else f"memory://{uuid.uuid4().hex}")
    with store.writer() as writer:
        STEPS.fill(writer, N_STEPS)
    store = DeltaStore.open(store.url)
    (ref,) = store.reader.commits[0].segments
    name = f"rank-00000/{ref.name}"
    start, stop = load_segment(store.files, "rank-00000", ref).payload_span(6)
    data = bytearray(store.files.read(name))
    data[(start + stop) // 2] ^= 1
    store.files.publish(name, [data])

    def unreachable(*args):
        raise PermissionError("denied")

    def salvage(*args):
        with monkeypatch.context() as context:
            for method in ("read", "view"):
                context.setattr(Files, method, unreachable)
            return salvage_segment(*args)

    with monkeypatch.context() as context:
        context.setattr("lightning_unlearn.store.maintenance.salvage_segment", salvage)
        with pytest.raises(PermissionError, match="denied"):
            store.repair()
    assert never_wrong(DeltaStore.open(store.url)) == [6]
    assert DeltaStore.open(store.url).repair().damaged_steps == (6,)


def test_what_was_purged_is_gone_on_the_disk_as_well(tmp_path, monkeypatch):
    store, done = recorded(tmp_path / "s"), []
    perform = Files.perform

    def noted(files, primitive, *args):
        perform(files, primitive, *args)
        done.append((primitive.__name__, Path(args[0])))

    monkeypatch.setattr(Files, "perform", noted)
    store.purge([STEPS[1]["sample_ids"][0]], [1, 7])
    removed = [place for place, (name, path) in enumerate(done) if name == "unlink" and path.name.startswith("segment")]
    assert len(removed) == 2
    assert ("_sync_directory", Path(store.url) / "rank-00000") in done[removed[-1] :]
