import json
import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_unlearn.exceptions import (
    MissingDeltaError,
    MissingRequirementError,
    StoreCorruptedError,
    StoreMismatchError,
)
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.documents import FORMAT_VERSION, to_document
from lightning_unlearn.types import DataFingerprint, ModelState, OptimizerInfo, RecordingSettings, StepStatus
from lightning_unlearn.utilities.parameters import model_signature, weights_digest
from tests.helpers.stores import Plain, Steps, holds_step, make_store


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    return str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_a_new_store_knows_what_it_was_told(url):
    assert not DeltaStore.exists(url)
    made = make_store(url, keep_overrides={"*.bias": 1.0}, watched=True)
    assert DeltaStore.exists(url)
    store = DeltaStore.open(url)
    assert store.store_id == made.store_id
    assert store.settings == RecordingSettings(0.1, {"*.bias": 1.0}, value_dtype="float32", watched=True)
    assert store.signature == model_signature(Plain())
    assert store.data == DataFingerprint("key", 20)
    assert (store.world_size, store.n_steps) == (1, 0)
    assert store.tip == store.state_of(weights_digest(Plain()))
    assert (store.tip.ranges, store.tip.edits, store.tip.travel) == ((), (), 0.0)
    weights = store.initial_weights()
    assert list(weights) == ["a", "b", "c", "d", "mean"] or set(weights) == {"a", "b", "c", "d", "mean"}
    assert all(torch.equal(weights[name], one) for name, one in Plain().named_parameters())


def test_an_existing_store_is_not_overwritten(url):
    store = make_store(url)
    with pytest.raises(StoreMismatchError, match="a place without a store"):
        make_store(url)
    assert DeltaStore.open(url).store_id == store.store_id


def test_no_store(url):
    with pytest.raises(StoreMismatchError, match="a place with a store of deltas"):
        DeltaStore.open(url)


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("no store")
    with pytest.raises(StoreMismatchError, match="a place with a store of deltas"):
        DeltaStore.open(tmp_path / "file")


def test_initial_weights_must_be_those_of_the_signature(url):
    with pytest.raises(StoreMismatchError, match="initial"):
        DeltaStore.create(
            url, signature=model_signature(Plain()), settings=RecordingSettings(0.1),
            data=DataFingerprint("position"), initial={"a": torch.zeros(3)},
        )  # fmt: skip
    assert not DeltaStore.exists(url)


def test_tied_and_half_precision_weights_are_kept(url):
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).to(torch.bfloat16)
    module[1].weight = module[0].weight
    view = torch.zeros(4)
    module.register_buffer("one", view[:2])
    module.register_buffer("two", view[1:])
    store = make_store(url, module=module)
    assert store.initial_weights()["0.weight"].dtype == torch.bfloat16
    assert store.state_of(weights_digest(module)) is not None


def test_compression_without_its_package_is_refused_before_anything_is_written(url, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(MissingRequirementError, match="zstd"):
        make_store(url, compression="zstd")
    assert not DeltaStore.exists(url)


@pytest.mark.parametrize("kind", ["store", "lineage"])
def test_another_format_version(tmp_path, kind, monkeypatch):
    store = make_store(tmp_path / "s")
    name = "store.json" if kind == "store" else store.lineage_file
    body = json.loads((tmp_path / "s" / name).read_text())["body"]
    monkeypatch.setattr("lightning_unlearn.store.documents.FORMAT_VERSION", 99)
    data = to_document(kind, body)
    monkeypatch.undo()
    (tmp_path / "s" / name).write_bytes(data)
    with pytest.raises(StoreMismatchError, match="format version 1 to 2, but got 99"):
        DeltaStore.open(store.url)


def test_parts_of_another_store_are_refused(tmp_path):
    one, two = make_store(tmp_path / "1"), make_store(tmp_path / "2")
    for store in (one, two):
        with store.writer() as writer:
            Steps().fill(writer, 1)
    shutil.copy(tmp_path / "1" / one.lineage_file, tmp_path / "2" / two.lineage_file)
    with pytest.raises(StoreMismatchError, match="lineage"):
        DeltaStore.open(two.url)
    shutil.rmtree(tmp_path / "1" / "rank-00000")
    shutil.copytree(tmp_path / "2" / "rank-00000", tmp_path / "1" / "rank-00000")
    with pytest.raises(StoreMismatchError, match="store and rank"):
        DeltaStore.open(one.url)


class Wider(Plain):
    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(9))


class Longer(Plain):
    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(2))


class Shorter(Plain):
    def __init__(self):
        super().__init__()
        del self.c


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Wider, r"b: \(8,\) in the store, \(9,\) in the model"),
        (Longer, r"extra: not recorded in the store, \(2,\) in the model"),
        (Shorter, r"c: \(4, 4, 4\) in the store, missing in the model"),
    ],
)
def test_another_model_is_refused(url, other, message):
    store = make_store(url)
    store.check_model(Plain())
    with pytest.raises(StoreMismatchError, match=message):
        store.check_model(other())


def test_buffers_matter_only_where_they_were_recorded(tmp_path):
    module = Plain()
    module.register_buffer("mean", torch.zeros(6))
    make_store(tmp_path / "1").check_model(module)
    with pytest.raises(StoreMismatchError, match="mean"):
        make_store(tmp_path / "2", buffers="record").check_model(module)


def test_two_ranks_are_merged(url):
    store, steps = make_store(url, world_size=2), Steps(keys=True)
    parts = ([0, 2], [1, 3])
    for rank, layers in enumerate(parts):
        with DeltaStore.open(url).writer(rank) as writer:
            for step in range(5 + rank):  # rank 1 is one step ahead of what rank 0 has committed
                mine = steps[step]
                mine["deltas"] = [delta for delta in mine["deltas"] if delta.layer in layers]
                mine["sample_ids"] = mine["sample_ids"][2 * rank : 2 * rank + 2]
                mine["batch_size"] = 2
                mine["seconds"] += rank
                status = StepStatus.OVER_BUDGET if (rank, step) == (1, 4) else StepStatus.STORED
                writer.append(**{**mine, "status": status, "deltas": None if status else mine["deltas"]})
    store.refresh()
    assert store.n_steps == 5
    for step in range(4):
        assert holds_step(store, step, {**steps[step], "seconds": steps[step]["seconds"] + 1})
    with pytest.raises(MissingDeltaError, match="size budget"):
        store.read(4)
    asked = steps[2]["sample_ids"][3]
    assert 2 in store.steps_of([asked])
    assert store.batch_sizes([0, 1]).tolist() == [4, 4]
    assert store.info().distinct_ids == len({one for step in range(5) for one in steps[step]["sample_ids"]})


@pytest.mark.parametrize(
    ("status", "reason"),
    [(StepStatus.UNWATCHED, "watched"), (StepStatus.OVER_BUDGET, "budget"), (StepStatus.PURGED, "purged")],
)
def test_a_missing_delta_says_why(url, status, reason):
    store, steps = make_store(url), Steps()
    with store.writer() as writer:
        writer.append(**steps.without_delta(0, status))
    store.refresh()
    with pytest.raises(MissingDeltaError, match=reason):
        store.read(0)
    for step in (1, -1):
        with pytest.raises(MissingDeltaError, match="the 1 recorded steps"):
            store.record(step)


def test_look_ups(url):
    store, steps = make_store(url), Steps(keys=True)
    with store.writer(segment_bytes=3000) as writer:
        steps.fill(writer, 30)
    store.refresh()
    asked = {"user-0003", 4, "nobody"}
    counts = {s: sum(one in asked for one in steps[s]["sample_ids"]) for s in range(30)}
    found, multiplicity = store.counts_of(asked, within=[(2, 20), (25, 30)])
    want = {s: n for s, n in counts.items() if n and (2 <= s < 20 or s >= 25)}
    assert dict(zip(found.tolist(), multiplicity.tolist(), strict=True)) == want
    assert store.steps_of(asked).tolist() == [s for s, n in counts.items() if n]
    assert store.unseen(["nobody", 4, 1, "4"]) == ["nobody", 1, "4"]
    assert store.ids_in([3, 7]) == set(steps[3]["sample_ids"]) | set(steps[7]["sample_ids"])
    assert store.seconds_of([(0, 2), (4, 5)]) == pytest.approx(0.25 + 1.25 + 4.25)


def test_ids_are_found_whatever_kind_of_integer_asks(url):
    store, steps = make_store(url), Steps()
    with store.writer() as writer:
        steps.fill(writer, 6)
    store.refresh()
    asked = steps[2]["sample_ids"][:2]
    found = store.steps_of(asked).tolist()
    assert 2 in found
    assert store.steps_of(np.array(asked)).tolist() == found
    assert store.unseen(np.array(asked)) == []
    store.purge(np.array(asked), np.array([2]))
    assert store.steps_of(asked).size == 0
    assert store.record(2).status is StepStatus.PURGED


@pytest.mark.parametrize("ids", ["user-7", [1.5], [True], [None]])
def test_what_is_no_id_is_refused_and_not_silently_unknown(url, ids):
    store = make_store(url)
    for ask in (store.steps_of, store.unseen, store.purge):
        with pytest.raises(ValueError, match="sample_ids"):
            ask(ids)


def test_info(url):
    store, steps = make_store(url, value_dtype="scaled_float16"), Steps()
    assert store.info().format_versions == (FORMAT_VERSION,)  # before there is a segment that could tell
    with store.writer() as writer:
        steps.fill(writer, 4)
        writer.append(**steps.without_delta(4, StepStatus.UNWATCHED))
    store.begin_run("fit", [OptimizerInfo("SGD", 0.1, 0.9)])
    info = store.info()
    kept = sum(delta.values.numel() for delta in steps[0]["deltas"])
    assert (info.steps, info.stored, info.kept) == (5, 4, 4 * kept)
    assert info.distinct_ids == len({one for step in range(5) for one in steps[step]["sample_ids"]})
    assert info.seconds == pytest.approx(sum(0.25 + step for step in range(5)))
    assert 2.5 < info.bytes_per_kept < 4
    assert info.bytes > 4 * kept * info.bytes_per_kept
    assert info.runs[0].optimizers == (OptimizerInfo("SGD", 0.1, 0.9),)
    text = str(info)
    assert "5 on 1 rank" in text
    assert "fit from step 5" in text


def test_errors_and_edits_are_kept_with_every_step(url):
    store, steps = make_store(url, value_dtype="int8", world_size=2), Steps()
    measured = {1: 0.25, 2: 0.75, 4: 0.5}
    for rank in range(2):
        with store.writer(rank, segment_bytes=4000) as writer:
            for step in range(6):
                mine = [delta for delta in steps[step]["deltas"] if delta.layer % 2 == rank]
                error = measured[step] + rank / 8 if step in measured else None
                writer.append(
                    **{**steps[step], "deltas": mine}, pruning_error=error, edited=(rank, step) in {(0, 3), (1, 5)}
                )
    store.refresh()
    records = [store.record(step) for step in range(6)]
    # each rank measures its own layers; the larger error stands for the step
    assert {one.step: one.pruning_error for one in records if not np.isnan(one.pruning_error)} == {
        step: error + 0.125 for step, error in measured.items()
    }
    assert [one.step for one in records if one.edited] == [3, 5]
    rounding = [one.rounding_error for one in records]
    assert [not np.isnan(error) for error in rounding] == [step in measured for step in range(6)]
    for step in measured:
        exact = {delta.layer: delta.values.double() for delta in steps[step]["deltas"]}
        read = {one.layer: one.values.double() for one in store.read(step).values()}
        ranks = [[layer for layer in exact if layer % 2 == rank] for rank in range(2)]
        errors = [
            torch.cat([read[layer] - exact[layer] for layer in layers]).norm()
            / torch.cat([exact[layer] for layer in layers]).norm()
            for layers in ranks
        ]
        assert rounding[step] == pytest.approx(float(max(errors)), rel=1e-6)
    assert records[0] == store.record(0)
    info = store.info()
    assert info.pruning_error == 0.625
    assert info.rounding_error == pytest.approx(np.median([rounding[step] for step in measured]))
    assert info.edited == 2
    text = str(info)
    assert "error of pruning: 0.625" in text
    assert "steps after an edit: 2" in text
    store.purge([steps[1]["sample_ids"][0]], [2])
    store.compact()
    store.refresh()
    assert [store.record(step).edited for step in range(6)] == [one.edited for one in records]
    assert [str(store.record(step).pruning_error) for step in range(6)] == [str(one.pruning_error) for one in records]


def test_the_bytes_are_those_on_disk(tmp_path):
    store = make_store(tmp_path / "s", world_size=2)
    for rank in range(2):
        with store.writer(rank) as writer:
            Steps().fill(writer, 2)
    store.refresh()
    assert store.info().bytes == sum(path.stat().st_size for path in (tmp_path / "s").rglob("*") if path.is_file())


def test_states(url):
    store = make_store(url)
    with store.writer() as writer:
        Steps().fill(writer, 4)
    known = ModelState("digest", ((0, 4),), (), 1.0, 2.0)
    store.begin_run("fit", [])
    with pytest.raises(StoreMismatchError, match="Flush"):
        store.add_state(replace(known, ranges=((0, 5),)))
    store.add_state(known)
    other = DeltaStore.open(url)
    assert other.tip == known
    assert other.state_of("digest") == known
    assert other.lineage.runs[0].first == 4
    other.truncate_states(3)
    assert other.state_of("digest") is None
    store.refresh()
    assert store.state_of("digest") is None


def test_two_changes_of_the_lineage_at_once_both_hold(tmp_path):
    """A request is honoured while another process makes weights known: neither may be lost."""
    make_store(tmp_path / "s")
    names = ["one", "two", "three"]

    def change(name):
        store = DeltaStore.open(tmp_path / "s")

        def slowly(lineage):
            time.sleep(0.1)  # the others have read the file by now, unless they wait
            return lineage.with_state(ModelState(name, (), (), 1.0, 1.0))

        store.update_lineage(slowly)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(change, names))
    store = DeltaStore.open(tmp_path / "s")
    assert {state.digest for state in store.lineage.states} >= set(names)
    assert store.verify().orphans == ()


def test_damaged_weights_are_not_returned(tmp_path):
    store = make_store(tmp_path / "s")
    path = tmp_path / "s" / store.initial_file
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(StoreCorruptedError, match=store.initial_file):
        store.initial_weights()
    path.unlink()
    with pytest.raises(StoreCorruptedError, match=store.initial_file):
        store.initial_weights()
