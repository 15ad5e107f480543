"""Parts that other nodes recorded are joined: whole afterwards, whatever interrupts it, and nothing else gets in."""

import contextlib
import shutil

import pytest

from lightning_unlearn.cli import main
from lightning_unlearn.exceptions import MissingDeltaError, StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.joined_writer import JoinedWriter
from lightning_unlearn.store.joining import join_parts
from lightning_unlearn.store.parts import open_here
from lightning_unlearn.types import ModelState
from lightning_unlearn.utilities.files import Files
from lightning_unlearn.utilities.rng import capture_rng
from tests.helpers.parts import file_contents, move_to_part, put_up_shelf
from tests.helpers.stores import Killed, Killer, Plain, Steps, make_store
from tests.store.test_crashes import content

STEPS = Steps(keys=True)
RANKS, COUNT = 3, 4


def record(url, start=0, stop=COUNT, *, ranks=range(RANKS), flush_every=2):
    """Steps of a store of three ranks, each with its share of layers and ids, and an anchor after every other step."""
    for rank in ranks:
        with DeltaStore.open(url, check=False).writer(rank) as writer:
            for step in range(start, stop):
                mine = [delta for delta in STEPS[step]["deltas"] if delta.layer % RANKS == rank]
                writer.append(**{**STEPS[step], "sample_ids": STEPS[step]["sample_ids"][rank::RANKS], "deltas": mine})
                if (step + 1) % flush_every == 0:
                    weights = dict(Plain().named_parameters()) if rank == 0 else None
                    writer.anchor(weights, None, capture_rng())
                    writer.flush()


def know(store, stop=COUNT):
    store.add_state(ModelState(f"after {stop}", ((0, stop),), (), 1.0, 1.0))


@pytest.fixture
def parted(tmp_path):
    return in_parts(tmp_path)


def in_parts(tmp_path, flush_every=2):
    """A store recorded in one place, and the same in three: rank 0's, and a part for each of the other ranks."""
    store = make_store(tmp_path / "whole", world_size=RANKS)
    record(store.url, flush_every=flush_every)
    store.begin_run("fit", [])
    know(store)
    shutil.copytree(tmp_path / "whole", tmp_path / "main")
    parts = [move_to_part(tmp_path / "main", tmp_path / f"node{rank}", rank) for rank in (1, 2)]
    return DeltaStore.open(tmp_path / "whole"), tmp_path / "main", parts


def same(store, whole):
    store = DeltaStore.open(store.url)
    anchors = [store.read_anchor(step, rank).rng.torch.tolist() for step in store.anchors for rank in range(RANKS)]
    wanted = [whole.read_anchor(step, rank).rng.torch.tolist() for step in whole.anchors for rank in range(RANKS)]
    return (
        store.verify().ok
        and content(store) == content(whole)
        and store.anchors == whole.anchors
        and anchors == wanted
        and store.lineage == whole.lineage
        and store.missing_ranks == ()
    )


def test_a_store_with_missing_parts_says_so(parted, capsys):
    _, main_url, parts = parted
    store = DeltaStore.open(main_url)
    info = store.info()
    assert info.missing_ranks == store.missing_ranks == (1, 2)
    assert "rank 1, 2" in dict(info.rows())["missing parts"]
    main(["store", "info", str(main_url)])
    assert "store join" in capsys.readouterr().out
    before = file_contents(main_url)
    for read in (
        lambda: store.n_steps,
        lambda: store.record(0),
        lambda: store.steps_of([1]),
        lambda: store.batch_sizes([0]),
        lambda: store.anchors,
        lambda: store.purge(["nobody"]),
        lambda: JoinedWriter(store),
    ):
        with pytest.raises(
            MissingDeltaError, match=r"4 steps of each of its 3 ranks.*no part of rank 1, 2.*store join"
        ):
            read()
    assert file_contents(main_url) == before
    report = store.verify()
    assert [(one.file, one.repairable) for one in report.damages] == [("rank-00001", False), ("rank-00002", False)]
    with pytest.raises(StoreMismatchError, match=r"a whole store.*part of store .* at .*node1"):
        DeltaStore.open(parts[0])
    assert DeltaStore.open(parts[0], check=False).verify().ok
    with pytest.raises(SystemExit):
        main(["store", "info", parts[0]])
    assert "Join it" in " ".join(capsys.readouterr().err.split())


def test_a_store_that_misses_a_part_is_not_taken_for_an_empty_one(parted):
    _, main_url, _ = parted
    store = DeltaStore.open(main_url)
    assert not store.is_blank
    with pytest.raises(StoreMismatchError, match="without a step"):
        store.discard_empty()


@pytest.mark.parametrize("at_once", [True, False])
def test_joined_it_is_the_store_of_one_place(parted, at_once):
    whole, main_url, parts = parted
    sources = {part: file_contents(part) for part in parts}
    store = DeltaStore.open(main_url)
    if at_once:
        joined = store.join(parts)
        assert (joined.ranks, joined.missing_ranks) == ((1, 2), ())
        assert "is whole" in str(joined)
    else:
        joined = store.join(parts[1:])
        assert (joined.ranks, joined.missing_ranks) == ((2,), (1,))
        assert "still missing: the parts of rank 1" in str(joined)
        assert store.info().missing_ranks == (1,)
        assert join_parts(main_url, parts[:1]).ranks == (1,)
    assert joined.files > 0
    assert joined.bytes > 0
    assert same(store, whole)
    before = file_contents(main_url)
    again = store.join([*parts, *parts])
    assert (again.ranks, again.files, again.bytes, again.missing_ranks) == ((), 0, 0, ())
    assert "Nothing to copy" in str(again)
    assert file_contents(main_url) == before
    assert {part: file_contents(part) for part in parts} == sources


def test_on_the_command_line(parted, capsys):
    whole, main_url, parts = parted
    main(["store", "join", str(main_url), *parts])
    assert "is whole" in " ".join(capsys.readouterr().out.split())
    assert same(DeltaStore.open(main_url), whole)
    with pytest.raises(SystemExit):
        main(["store", "join", str(main_url), str(main_url) + "-none"])
    assert "a place with a store" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("scheme", ["file", "memory", "shelf"])
def test_a_new_place_of_any_kind(parted, tmp_path, scheme):
    whole, main_url, parts = parted
    put_up_shelf()
    url = f"{scheme}://{tmp_path}/joined"
    with pytest.raises(StoreMismatchError, match=r"no store is at .*parts only"):
        join_parts(url, parts)
    assert join_parts(url, [parts[0], main_url]).missing_ranks == (2,)
    assert join_parts(url, parts[1:]).missing_ranks == ()
    assert same(DeltaStore.open(url), whole)
    assert join_parts(url, [main_url, *parts]).ranks == ()


@pytest.mark.parametrize(("new", "torn"), [(False, True), (True, False)], ids=["into rank 0's", "into a new place"])
def test_killed_at_every_write_it_is_finished_by_joining_again(tmp_path, monkeypatch, torn, new):
    whole, main_url, parts = in_parts(tmp_path, COUNT)  # one segment and one anchor for each rank
    sources = [*parts, str(main_url)] if new else parts
    states, wanted = set(), content(whole)
    for survive in range(400):
        url = tmp_path / "joined" / str(survive)
        if not new:
            shutil.copytree(main_url, url)
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn).install(patch)
            with contextlib.suppress(Killed):
                join_parts(url, sources)
        if DeltaStore.exists(url):
            reopened = DeltaStore.open(url)
            states.add(reopened.missing_ranks)
            if reopened.missing_ranks:
                with pytest.raises(MissingDeltaError):
                    reopened.record(0)
            else:
                assert content(reopened) == wanted
        else:
            assert new
            states.add(None)
        assert join_parts(url, sources).missing_ranks == ()
        finished = DeltaStore.open(url)
        assert content(finished) == wanted
        assert finished.anchors == whole.anchors
        report = finished.verify()
        assert report.ok
        if any(name.startswith("rank-") for name in report.orphans):
            assert killer.struck
            JoinedWriter(finished).close()  # the next writer removes what a crash has left
            assert not [name for name in finished.verify().orphans if name.startswith("rank-")]
        if not killer.struck:
            assert same(finished, whole)
            break
        shutil.rmtree(url)
    assert not killer.struck
    assert states == ({None, ()} if new else {(1, 2), (2,), ()})
    assert survive > 25


def test_a_full_disk_leaves_no_half_of_it(parted, monkeypatch):
    whole, main_url, parts = parted
    before = file_contents(main_url)
    publish = Files.publish

    def full(files, name, data, **kwargs):
        if "segment" in name and "rank-00002" in name:
            raise OSError(28, "No space left on device", name)
        publish(files, name, data, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Files, "publish", full)
        with pytest.raises(OSError, match="No space left"):
            join_parts(main_url, parts[1:])
    left = {name for name in file_contents(main_url) if name.suffix == ".safetensors"}
    assert left == {name for name in before if name.suffix == ".safetensors"}
    join_parts(main_url, parts)
    assert same(DeltaStore.open(main_url), whole)


def test_a_part_of_another_store_is_refused(parted, tmp_path):
    _, main_url, parts = parted
    other = make_store(tmp_path / "other", world_size=RANKS)
    record(other.url)
    before = file_contents(main_url)
    for wrong in (other.url, move_to_part(other.url, tmp_path / "other-part", 1)):
        with pytest.raises(StoreMismatchError, match=rf"{wrong}` to be a part of store .*{other.store_id}"):
            join_parts(main_url, [parts[0], wrong])
    with pytest.raises(StoreMismatchError, match="a whole store"):
        join_parts(parts[0], [parts[1]])
    assert file_contents(main_url) == before


def test_a_rank_twice_with_other_steps_is_refused(parted, tmp_path):
    _, main_url, parts = parted
    twin = tmp_path / "twin"
    shutil.copytree(parts[0], twin)
    with DeltaStore.open(twin, check=False).writer(1) as writer:
        writer.truncate(3)
        writer.append(**STEPS[9])
    before = file_contents(main_url)
    with pytest.raises(StoreMismatchError, match=r"another step 3 of rank 1 than in .*node1"):
        join_parts(main_url, [*parts, twin])
    assert file_contents(main_url) == before


def test_a_damaged_file_is_not_copied(parted, tmp_path):
    whole, main_url, parts = parted
    for kind in ("segment", "anchor"):
        broken = tmp_path / kind
        shutil.copytree(parts[0], broken)
        path = next(broken.rglob(f"{kind}-*"))
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        before = file_contents(main_url)
        with pytest.raises(StoreCorruptedError, match=path.name):
            join_parts(main_url, [broken])
        assert file_contents(main_url) == before
    join_parts(main_url, parts)
    assert same(DeltaStore.open(main_url), whole)


def test_what_was_not_written_as_it_was_read_is_noticed(parted, monkeypatch):
    _, main_url, parts = parted
    publish = Files.publish

    def altered(files, name, data, **kwargs):
        data = [b"".join(data)[:-1] + b"\0"] if "segment" in name else data
        publish(files, name, data, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Files, "publish", altered)
        with pytest.raises(StoreCorruptedError, match="did not keep what was written"):
            join_parts(main_url, parts)
    assert DeltaStore.open(main_url).missing_ranks == (1, 2)


def test_a_part_is_not_joined_to_what_a_purge_has_changed(parted):
    _, main_url, parts = parted
    join_parts(main_url, parts)
    store = DeltaStore.open(main_url)
    store.purge([], [1])  # of which every rank drops its delta, so no part may be joined to it any more
    with pytest.raises(StoreMismatchError, match=r"another step 1 of rank 1.*purged"):
        join_parts(main_url, parts)


def test_anchors_that_a_purge_removed_do_not_come_back(parted):
    """Rank 0 alone has seen the id, and other ranks' anchors of the steps behind it were removed all the same."""
    whole, main_url, parts = parted
    join_parts(main_url, parts)
    store = DeltaStore.open(main_url)
    asked = STEPS[2]["sample_ids"][0]
    assert not [step for step in range(COUNT) for rank in (1, 2) if asked in STEPS[step]["sample_ids"][rank::RANKS]]
    store.purge([asked])
    store.refresh()
    kept = store.anchors
    assert kept != whole.anchors
    record(main_url, COUNT, COUNT + 2, ranks=[0])
    for rank, part in enumerate(parts, 1):
        record(part, COUNT, COUNT + 2, ranks=[rank])
    assert join_parts(main_url, parts).ranks == (1, 2)
    store.refresh()
    assert store.n_steps == COUNT + 2
    assert store.anchors == [*kept, COUNT + 2]


def test_a_part_that_was_merged_since_is_still_the_same(parted):
    whole, main_url, parts = parted
    join_parts(main_url, parts)
    DeltaStore.open(parts[0], check=False).compact()
    assert join_parts(main_url, parts).ranks == ()
    record(main_url, COUNT, COUNT + 1, ranks=[0])
    for rank, part in enumerate(parts, 1):
        record(part, COUNT, COUNT + 1, ranks=[rank])
    assert join_parts(main_url, parts).ranks == (1, 2)
    store = DeltaStore.open(main_url)
    assert store.n_steps == COUNT + 1
    assert content(store)[:COUNT] == content(whole)
    assert store.verify().ok


def test_newer_steps_of_rank_0_need_its_lineage(parted, tmp_path):
    _, main_url, parts = parted
    join_parts(tmp_path / "new", [main_url, *parts])
    record(main_url, COUNT, COUNT + 1, ranks=[0])
    with pytest.raises(StoreMismatchError, match="parts of other nodes than rank 0's"):
        join_parts(tmp_path / "new", [main_url])


def test_nothing_named(parted):
    with pytest.raises(StoreMismatchError, match="none"):
        join_parts(parted[1] / "nowhere", [])
    assert join_parts(parted[1], []).missing_ranks == (1, 2)


def test_open_here_finds_makes_replaces_and_refuses(tmp_path, monkeypatch):
    store = make_store(tmp_path / "main", world_size=2)
    assert not open_here(tmp_path / "main", store.body, 1, begins=True).is_part
    with pytest.raises(StoreMismatchError, match=r"store of rank 1.*nothing at"):
        open_here(tmp_path / "node", store.body, 1, begins=False)
    assert not (tmp_path / "node").exists()
    part = open_here(tmp_path / "node", store.body, 1, begins=True)
    assert (part.is_part, part.store_id, part.world_size) == (True, store.store_id, 2)
    assert open_here(tmp_path / "node", store.body, 1, begins=False).is_part
    part.writer(1).close()
    newer = make_store(tmp_path / "newer", world_size=2)
    assert open_here(tmp_path / "node", newer.body, 1, begins=True).store_id == newer.store_id
    with DeltaStore.open(tmp_path / "node", check=False).writer(1) as writer:
        writer.append(**STEPS[0])
    before = file_contents(tmp_path / "node")
    with pytest.raises(StoreMismatchError, match=rf"store {newer.store_id} at .*Remove it"):
        open_here(tmp_path / "node", store.body, 1, begins=True)
    assert file_contents(tmp_path / "node") == before
    with pytest.raises(StoreMismatchError, match="Give every rank access"):
        open_here("memory://nothing-here", store.body, 1, begins=True)
    # A shared file system that shows rank 0's store a moment late is no place for a part.
    with monkeypatch.context() as patch:
        exists, asked = Files.exists, []

        def late(files, name):
            asked.append(name)
            return len(asked) > 2 and exists(files, name)

        patch.setattr(Files, "exists", late)
        assert not open_here(tmp_path / "main", store.body, 1, begins=True).is_part
    assert not DeltaStore.open(tmp_path / "main").is_part
    assert DeltaStore.open(tmp_path / "main").body == store.body


def test_a_left_over_that_a_cache_still_shows_costs_nothing(tmp_path, monkeypatch):
    """Rank 0 has replaced it by now, and what is removed by name would be the new store's."""
    store = make_store(tmp_path / "main", world_size=2)
    stale = open_here(tmp_path / "old", {**store.body, "store_id": "0" * 32}, 1, begins=True)
    before = file_contents(tmp_path / "main")
    monkeypatch.setattr("lightning_unlearn.store.parts._found", lambda url, files: stale)
    with pytest.raises(StoreMismatchError, match="older state: start again"):
        open_here(tmp_path / "main", store.body, 1, begins=True)
    after = file_contents(tmp_path / "main")
    assert {name: after[name] for name in before} == before
