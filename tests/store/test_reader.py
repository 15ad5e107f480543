"""A view of a store that goes on being written: what was seen stays readable, or is said to have been replaced."""

import uuid

import pytest

from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store import maintenance
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.stores import Steps, holds_step, make_store

STEPS = Steps()
AT_ONCE = 8  # publications after which the writer merges


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    return str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def publish(writer, count):
    for _ in range(count):
        STEPS.fill(writer, 1)
        writer.flush()


def test_segments_that_are_merged_between_opening_and_reading(url):
    writer = make_store(url).writer()
    publish(writer, AT_ONCE - 2)
    view = DeltaStore.open(url)
    names = [ref.name for ref in view.reader.commits[0].segments]
    publish(writer, 2)
    assert not any(view.files.exists(f"rank-00000/{name}") for name in names)
    assert view.n_steps == AT_ONCE - 2
    assert all(holds_step(view, step, STEPS[step]) for step in range(view.n_steps))
    wanted = STEPS[0]["sample_ids"][0]
    seen = [step for step in range(AT_ONCE) if wanted in STEPS[step]["sample_ids"]]
    assert view.steps_of([wanted]).tolist() == [step for step in seen if step < AT_ONCE - 2]
    writer.close()


def test_segments_that_are_merged_after_their_heads_were_read(url):
    writer = make_store(url).writer()
    publish(writer, AT_ONCE - 2)
    view = DeltaStore.open(url)
    assert view.batch_sizes(range(view.n_steps)).tolist() == [4] * view.n_steps
    publish(writer, 2)
    for read in (lambda: view.read(0), lambda: view.record(0), lambda: view.steps_of([1])):
        with pytest.raises(StoreMismatchError, match=r"newer state.*refresh"):
            read()
    view.refresh()
    assert view.n_steps == AT_ONCE
    assert holds_step(view, 0, STEPS[0])
    writer.close()


def test_steps_that_are_dropped_between_opening_and_reading(url):
    writer = make_store(url).writer()
    publish(writer, 3)
    view = DeltaStore.open(url)
    writer.truncate(1)
    assert view.reader.index.n_steps == view.n_steps == 1
    assert holds_step(view, 0, STEPS[0])
    writer.close()


def test_a_file_that_is_gone_is_damage(url):
    with make_store(url).writer() as writer:
        publish(writer, 2)
    view, late = DeltaStore.open(url), DeltaStore.open(url)
    assert late.batch_sizes([0]).tolist() == [4]
    name = f"rank-00000/{view.reader.commits[0].segments[0].name}"
    view.files.delete(name)
    for store in (view, late):
        with pytest.raises(StoreCorruptedError, match=name):
            store.read(0)


def test_verifying_a_store_while_its_segments_are_merged(url, monkeypatch):
    writer = make_store(url).writer()
    publish(writer, AT_ONCE - 1)
    check, calls = maintenance.check_segment, []

    def merged_meanwhile(files, directory, ref):
        calls.append(ref)
        if len(calls) == 3:
            publish(writer, 1)
        return check(files, directory, ref)

    monkeypatch.setattr(maintenance, "check_segment", merged_meanwhile)
    report = DeltaStore.open(url).verify()
    assert report.ok, str(report)
    assert (report.steps, report.files) == (AT_ONCE, 5)
    assert calls[-1].stop == AT_ONCE
    writer.close()
