import threading
import uuid

import pytest
import torch

from lightning_unlearn.exceptions import LightningUnlearnError, StoreMismatchError, UnlearningWarning
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import LayerDelta, StepStatus
from tests.helpers.stores import Killed, Killer, Steps, holds_step, make_store


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    return str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


@pytest.mark.parametrize("background", [False, "auto", True])
@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("segment_bytes", [1, 3000, 2**26])
def test_what_was_appended_is_read(url, background, compression, segment_bytes):
    store, steps = make_store(url, compression=compression), Steps(keys=True)
    with store.writer(background=background, segment_bytes=segment_bytes) as writer:
        ordinals = [writer.append(**steps[step]) for step in range(12)]
        assert writer.n_steps == 12
    assert ordinals == list(range(12))
    with store.writer(background=background) as writer:
        steps.fill(writer, 3)
    store.refresh()
    assert store.n_steps == 15
    assert all(holds_step(store, step, steps[step]) for step in range(15))
    assert store.verify().ok


def test_memory_is_bounded_by_the_segment_size(tmp_path):
    store, steps = make_store(tmp_path / "s"), Steps(keep=1.0)
    with store.writer(segment_bytes=10_000) as writer:
        for step in range(60):
            writer.append(**steps[step])
            assert writer._buffered_bytes < 10_000
    sizes = [ref.bytes for ref in DeltaStore.open(tmp_path / "s").reader.commits[0].segments]
    assert len(sizes) > 8
    assert max(sizes) < 20_000


def test_only_what_was_flushed_is_seen(url):
    store, steps = make_store(url), Steps()
    writer = store.writer()
    steps.fill(writer, 2)
    writer.flush()
    steps.fill(writer, 2)
    store.refresh()
    assert store.n_steps == 2
    writer.abandon()
    with pytest.raises(LightningUnlearnError, match="open"):
        writer.append(**steps[4])
    store.refresh()
    assert store.n_steps == 2


@pytest.mark.parametrize("background", [False, "auto", True])
@pytest.mark.parametrize("n_steps", [0, 2, 3, 5, 6, 7])
def test_truncate(url, n_steps, background):
    store, steps = make_store(url), Steps()
    with store.writer(background=background) as writer:
        steps.fill(writer, 3)
        writer.flush()
        steps.fill(writer, 3)
        writer.flush()
        steps.fill(writer, 1)
        writer.truncate(n_steps)
        assert writer.n_steps == n_steps
        other = Steps(seed=1)
        other.fill(writer, 2)
    store.refresh()
    assert store.n_steps == n_steps + 2
    assert all(holds_step(store, step, steps[step]) for step in range(n_steps))
    assert all(holds_step(store, step, other[step]) for step in range(n_steps, n_steps + 2))
    report = store.verify()
    assert report.ok
    assert not report.orphans


def test_truncating_to_more_than_there_is(url):
    with make_store(url).writer() as writer, pytest.raises(ValueError, match="at most the 0 steps"):
        writer.truncate(1)


def test_a_reason_instead_of_a_delta(url):
    store, steps = make_store(url), Steps()
    with store.writer() as writer:
        writer.append(**steps.without_delta(0, StepStatus.UNWATCHED))
        steps.fill(writer, 1)
    store.refresh()
    assert holds_step(store, 0, steps[0], StepStatus.UNWATCHED)
    assert holds_step(store, 1, steps[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deltas": None}, "deltas"),
        ({"status": StepStatus.UNWATCHED}, "UNWATCHED"),
        ({"sample_ids": [1.5]}, "integers or strings"),
        ({"batch_size": -1}, "batch_size"),
        ({"optimizer": -1}, "optimizer"),
        ({"deltas": [LayerDelta(9, None, torch.ones(1))]}, "layer"),
        ({"deltas": [LayerDelta(1, None, torch.ones(7))]}, "positions below 8"),
        ({"deltas": [LayerDelta(1, torch.tensor([0]), torch.tensor([float("nan")]))]}, "finite"),
    ],
)
def test_bad_arguments_leave_the_writer_as_it_was(url, change, message):
    store, steps = make_store(url), Steps()
    with store.writer() as writer:
        with pytest.raises(ValueError, match=message):
            writer.append(**{**steps[0], **change})
        assert writer.n_steps == 0
        steps.fill(writer, 2)
    store.refresh()
    assert all(holds_step(store, step, steps[step]) for step in range(2))


def fill_and_close(writer, steps, count):
    steps.fill(writer, count)
    writer.close()


@pytest.mark.parametrize("background", [False, "auto", True])
def test_the_size_budget_keeps_everything_but_the_deltas(url, background):
    store, steps = make_store(url), Steps()
    one = len(b"".join(d.values.numpy().tobytes() for d in steps[0]["deltas"]))
    writer = store.writer(size_budget=4 * one, background=background)
    with pytest.warns(UnlearningWarning, match="size budget") as caught:
        fill_and_close(writer, steps, 8)
    assert len(caught) == 1
    store.refresh()
    statuses = store.statuses(range(8)).tolist()
    stored = statuses.count(StepStatus.STORED)
    assert 0 < stored <= 4
    assert statuses == [StepStatus.STORED] * stored + [StepStatus.OVER_BUDGET] * (8 - stored)
    assert all(holds_step(store, step, steps[step], StepStatus(status)) for step, status in enumerate(statuses))
    with store.writer(size_budget=4 * one) as again, pytest.warns(UnlearningWarning, match="size budget"):
        steps.fill(again, 1)


def test_two_writers_on_one_machine(tmp_path):
    store, steps = make_store(tmp_path / "s"), Steps()
    with store.writer() as writer:
        with pytest.raises(StoreMismatchError, match="another writer"):
            store.writer()
        steps.fill(writer, 1)
    with store.writer() as writer:
        assert writer.n_steps == 1


def test_two_writers_where_nothing_can_be_locked(monkeypatch):
    store, steps = make_store(f"memory://{uuid.uuid4().hex}"), Steps()
    first = store.writer()
    steps.fill(first, 2)
    first.flush()
    steps.fill(first, 1)
    second = store.writer()  # takes over: the first one fails at its next publication
    assert second.n_steps == 2
    with pytest.raises(StoreMismatchError, match="another writer"):
        first.flush()
    Steps(seed=1).fill(second, 3)
    second.flush()
    with pytest.raises(StoreMismatchError, match="another writer"):
        first.append(**steps[3])
    first.abandon()
    second.close()
    store.refresh()
    assert store.n_steps == 5
    assert store.verify().ok
    assert holds_step(store, 4, Steps(seed=1)[4])


def test_a_stale_writer_cannot_slip_into_a_gap_of_numbers():
    store, steps = make_store(f"memory://{uuid.uuid4().hex}"), Steps()
    first, second = store.writer(), store.writer()
    for _ in range(3):  # commits that remove the ones before them
        steps.fill(second, 1)
        second.flush()
    steps.fill(first, 1)
    with pytest.raises(StoreMismatchError, match="another writer"):
        first.flush()
    first.abandon()
    second.close()
    store.refresh()
    assert all(holds_step(store, step, steps[step]) for step in range(3))


@pytest.mark.parametrize("background", [False, "auto", True])
def test_after_a_failed_publication_nothing_more_is_written(tmp_path, monkeypatch, background):
    store, steps = make_store(tmp_path / "s"), Steps()
    writer = store.writer(background=background)
    steps.fill(writer, 2)
    writer.flush()
    steps.fill(writer, 1)
    with monkeypatch.context() as patch:
        Killer(2).install(patch)
        with pytest.raises(Killed):
            writer.flush()
    with pytest.raises(Killed):
        writer.append(**steps[3])
    with pytest.raises(Killed):
        writer.close()
    writer.close()
    store.refresh()
    assert store.n_steps == 2


def test_errors_of_the_background_reach_the_next_call(tmp_path):
    writer = make_store(tmp_path / "s").writer(background=True)
    bad = [LayerDelta(1, torch.tensor([0]), torch.tensor([float("inf")]))]
    writer.append(**{**Steps()[0], "deltas": bad})
    with pytest.raises(ValueError, match="finite"):
        writer.flush()
    with pytest.raises(ValueError, match="finite"):
        writer.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "store-writer"]


def test_buffers_are_written_whole(tmp_path):
    store = make_store(tmp_path / "s", value_dtype="scaled_float16", buffers="record")
    values = torch.tensor([1.0, 1e-12, -3.3333333, 7e8, 0.1])
    with store.writer() as writer:
        writer.append(
            **{**Steps()[0], "deltas": [LayerDelta(4, None, values), LayerDelta(1, None, torch.full((8,), 0.1))]}
        )
    store.refresh()
    read = store.read(0)
    assert torch.equal(read["mean"].values, values)
    assert not torch.equal(read["b"].values, torch.full((8,), 0.1))
    assert list(read) == ["b", "mean"]


def test_an_unknown_rank(tmp_path):
    with pytest.raises(StoreMismatchError, match="world size 1"):
        make_store(tmp_path / "s").writer(1)
