"""A store of several ranks, continued by one process."""

import pytest

from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.joined_writer import JoinedWriter
from lightning_unlearn.types import StepStatus
from tests.helpers.stores import Steps, make_store

STEPS = Steps()


def two_ranks(url, ahead=0):
    """Four steps on both ranks, and `ahead` more on the first alone."""
    store = make_store(url, world_size=2)
    for rank in range(2):
        with store.writer(rank) as writer:
            for step in range(4 + (ahead if rank == 0 else 0)):
                writer.append(**STEPS[step])
    store.refresh()
    return store


@pytest.mark.parametrize("ahead", [0, 3])
def test_whole_steps_behind_shared_ones(tmp_path, ahead):
    store = two_ranks(tmp_path / "s", ahead)
    writer = JoinedWriter(store)
    assert writer.n_steps == 4, "what one rank was ahead is no step"
    for step in (7, 8, 9):
        assert writer.append(**STEPS[step]) == step - 3
    assert writer.append(**STEPS.without_delta(5, StepStatus.UNWATCHED)) == 7
    writer.close()
    opened = DeltaStore.open(tmp_path / "s")
    assert opened.n_steps == 8
    assert opened.verify().ok
    for place, step in ((4, 7), (5, 8), (6, 9)):
        record = opened.record(place)
        assert record.sample_ids == tuple(STEPS[step]["sample_ids"])
        assert record.batch_size == STEPS[step]["batch_size"]
        assert record.seconds == STEPS[step]["seconds"]
        assert record.status == StepStatus.STORED
        assert len(opened.read(place)) == len(STEPS[step]["deltas"])
    assert opened.record(7).status == StepStatus.UNWATCHED
    assert opened.record(0).batch_size == 2 * STEPS[0]["batch_size"]


def test_truncated_and_abandoned_together(tmp_path):
    store = two_ranks(tmp_path / "s")
    writer = JoinedWriter(store)
    writer.append(**STEPS[4])
    writer.flush()
    writer.append(**STEPS[5])
    writer.truncate(3)
    assert writer.n_steps == 3
    writer.append(**STEPS[6])
    writer.abandon()
    assert DeltaStore.open(tmp_path / "s").n_steps == 3
    JoinedWriter(store).close()


def test_a_part_that_is_taken(tmp_path):
    store = two_ranks(tmp_path / "s")
    with store.writer(1), pytest.raises(StoreMismatchError, match="another writer"):
        JoinedWriter(store)
    store.writer(0).close()
