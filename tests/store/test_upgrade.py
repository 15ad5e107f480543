"""Stores that a release of format version 1 wrote (`version1/`, with what they hold): read, forgotten from, upgraded.

They were made by that release's own writer: `plain` with integer ids on one rank, `zstd` with strings, integers and an
integer beyond 64 bits on two ranks, compressed, with a subtraction in the ledger.
"""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from lightning_unlearn.cli import main
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import DeletionRequestError, StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.documents import FORMAT_VERSION
from lightning_unlearn.types import StepStatus
from lightning_unlearn.utilities.parameters import weights_digest
from tests.helpers.stores import Killed, Killer, Plain, Steps, holds_step, tensor_span

OLD = Path(__file__).parent / "version1"
NAMES = ("plain", "zstd")


def copied(tmp_path, name):
    shutil.copytree(OLD / name, tmp_path / name)
    if (OLD / f"{name}.ledger-key").exists():
        shutil.copy(OLD / f"{name}.ledger-key", tmp_path)
    return DeltaStore.open(tmp_path / name), json.loads((OLD / f"{name}.json").read_text())


def content(store):
    rows = []
    for step in range(store.n_steps):
        record = store.record(step)
        delta = None
        if record.status is StepStatus.STORED:
            read = store.read(step).items()
            delta = {
                name: [None if one.indices is None else one.indices.tolist(), one.values.tolist()] for name, one in read
            }
        rows.append(
            {
                "optimizer": record.optimizer,
                "sample_ids": list(record.sample_ids),
                "batch_size": record.batch_size,
                "seconds": record.seconds,
                "status": record.status.name,
                "delta": delta,
            }
        )
    return rows


def holds_everything(store, want):
    """Whether every reading function gives what the release of version 1 gave."""
    asked = [one for one, _, _ in want["counts_of"]]
    info = store.info()
    assert (store.store_id, store.world_size) == (want["store_id"], want["world_size"])
    assert content(store) == want["steps"]
    for one, steps, counts in want["counts_of"]:
        assert [found.tolist() for found in store.counts_of([one])] == [steps, counts]
    assert store.unseen([*asked, "nobody", 10**30]) == want["unseen"]
    assert store.ids_in(range(store.n_steps)) == {one for row in want["steps"] for one in row["sample_ids"]}
    assert store.batch_sizes(range(store.n_steps)).tolist() == [row["batch_size"] for row in want["steps"]]
    assert {name: one.tolist() for name, one in store.initial_weights().items()} == want["initial"]
    assert (info.kept, info.distinct_ids, info.stored) == (want["kept"], want["distinct_ids"], want["stored"])
    assert (info.pruning_error, info.rounding_error, info.edited) == (None, None, 0)
    states = [[state.digest, [list(one) for one in state.ranges], list(state.edits)] for state in store.lineage.states]
    assert states == want["states"]
    entries = [[one.entry_id, one.method, one.purged, one.undone] for one in store.lineage.entries]
    assert entries == want["entries"]
    assert store.verify().ok
    return True


def segment_versions(store):
    return [segment.version for segments in store.reader.segments for segment in segments]


@pytest.mark.parametrize("name", NAMES)
def test_an_old_store_is_read_as_it_was(tmp_path, name):
    store, want = copied(tmp_path, name)
    before = {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
    assert store.version == 1
    assert set(segment_versions(store)) == {1}
    assert holds_everything(store, want)
    assert {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()} == before


def test_an_old_ledger_is_in_force(tmp_path):
    store, want = copied(tmp_path, "zstd")
    module = Plain()
    with torch.no_grad():
        module.a.add_(1.0)
    asked = want["asked"]
    plan = DeletionRequest([asked]).plan(store, module)  # a copy of the weights from before the edit
    assert sorted([step, amount] for step, amount in plan.amounts.items()) == want["amounts"]
    with torch.no_grad():
        module.a.sub_(0.5)
    assert store.state_of(weights_digest(module)).edits == tuple(entry[0] for entry in want["entries"])
    with pytest.raises(DeletionRequestError, match=want["entries"][0][0]):
        DeletionRequest([asked]).plan(store, module).check()
    DeletionLedger.open(store).purge(want["entries"][0][0])  # forgetting does not wait for an upgrade
    store.refresh()
    assert store.steps_of([asked]).size == 0
    assert store.verify().ok
    store.upgrade()
    assert store.steps_of([asked]).size == 0
    assert set(segment_versions(store)) == {FORMAT_VERSION}


def test_an_old_store_is_not_written_to(tmp_path):
    store, _ = copied(tmp_path, "plain")
    with pytest.raises(StoreMismatchError, match=r"format version 2 .* got 'version 1'.*store upgrade"):
        store.writer()
    store.upgrade()
    with store.writer() as writer:
        Steps(keep=0.3).fill(writer, 1)
    store.refresh()
    assert holds_step(store, 6, Steps(keep=0.3)[6])


@pytest.mark.parametrize("name", NAMES)
def test_an_upgrade_changes_no_content(tmp_path, name):
    store, want = copied(tmp_path, name)
    count = len(segment_versions(store))
    assert store.info().format_versions == (1,)
    assert store.upgrade() == count
    for opened in (store, DeltaStore.open(store.url)):
        assert opened.version == FORMAT_VERSION
        assert set(segment_versions(opened)) == {FORMAT_VERSION}
        assert holds_everything(opened, want)
    assert store.verify().orphans == ()
    documents = list((tmp_path / name).rglob("*.json"))
    assert {json.loads(path.read_text())["version"] for path in documents} == {FORMAT_VERSION}
    before = {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
    assert store.upgrade() == 0
    assert {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()} == before


def test_old_segments_are_merged_and_cut(tmp_path):
    store, want = copied(tmp_path, "zstd")
    assert store.compact() == 2
    store.refresh()
    assert store.info().format_versions == tuple(sorted(segment_versions(store))) == (1, FORMAT_VERSION)
    assert holds_everything(store, want)
    store.upgrade()
    assert holds_everything(store, want)
    with store.writer(0) as writer:
        writer.truncate(4)
    store.refresh()
    assert content(store) == want["steps"][:4]


@pytest.mark.parametrize("name", NAMES)
def test_an_upgrade_that_is_killed_goes_on(tmp_path, monkeypatch, name):
    for survive in range(200):
        folder = tmp_path / str(survive)
        store, want = copied(folder, name)
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn=survive % 2 == 0).install(patch)
            with contextlib.suppress(Killed):
                store.upgrade()
        reopened = DeltaStore.open(store.url)
        assert content(reopened) == want["steps"]
        assert reopened.verify().ok
        if not killer.struck:
            break
        if survive % 3 == 0:  # and again in the middle of going on
            with monkeypatch.context() as patch:
                Killer(5).install(patch)
                with contextlib.suppress(Killed):
                    reopened.upgrade()
            reopened = DeltaStore.open(store.url)
        reopened.upgrade()
        assert set(segment_versions(reopened)) == {FORMAT_VERSION}
        assert holds_everything(DeltaStore.open(store.url), want)
        assert [orphan for orphan in reopened.verify().orphans if orphan.startswith("rank-")] == []
    assert not killer.struck
    assert survive > 20


@pytest.mark.parametrize(("tensor", "lost_ids"), [("seconds", True), ("payload", False)])
def test_damage_to_an_old_store_is_named_and_repaired(tmp_path, tensor, lost_ids):
    store, want = copied(tmp_path, "plain")
    path = sorted((tmp_path / "plain" / "rank-00000").glob("segment-*"))[0]
    data = bytearray(path.read_bytes())
    data[tensor_span(path, tensor)[0]] ^= 1
    path.write_bytes(data)
    report = store.verify()
    assert report.damaged_steps == (0,)
    assert report.damages[0].lost_ids == ((0,) if lost_ids else ())
    with pytest.raises(StoreCorruptedError, match="repair"):
        store.upgrade()
    store.repair()
    store.upgrade()
    assert store.verify().ok
    found = content(store)
    assert found[1:] == want["steps"][1:]
    assert found[0]["status"] == "LOST"
    assert found[0]["sample_ids"] == ([] if lost_ids else want["steps"][0]["sample_ids"])


def test_a_newer_segment_is_refused_naming_both(tmp_path):
    store, _ = copied(tmp_path, "plain")
    store.upgrade()
    path = next((tmp_path / "plain" / "rank-00000").glob("segment-*"))
    path.write_bytes(path.read_bytes().replace(b'"version":"2"', b'"version":"3"', 1))
    with pytest.raises(StoreCorruptedError, match="checksum"):
        DeltaStore.open(store.url).record(0)


def test_the_command(tmp_path, capsys):
    store, want = copied(tmp_path, "zstd")
    main(["store", "upgrade", store.url])
    assert "format version 2; 3 segments rewritten" in capsys.readouterr().out
    main(["store", "compact", store.url])
    assert "2 segments became part of larger ones" in capsys.readouterr().out
    main(["store", "compact", store.url])
    assert "0 segments" in capsys.readouterr().out
    assert holds_everything(DeltaStore.open(store.url), want)
