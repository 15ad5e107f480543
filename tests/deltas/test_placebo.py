"""The placebo: innocent, as many, placed alike, and the same for the same seed."""

import pytest
from torch.utils.data import DataLoader

from lightning_unlearn.callbacks.subject_grouping import SubjectGrouping
from lightning_unlearn.deltas.placebo import placebo_request
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import DeletionRequestError, UnlearningWarning
from tests.helpers.recorded import BATCH, datasets, record


def recorded(folder, grouped, keyed, sizes=(4, 4, 4)):
    """Rows 0.. belong to subjects of the given sizes, all others to nobody."""
    subjects = [f"user-{number}" for number, size in enumerate(sizes) for _ in range(size)]
    subjects += [None] * (64 - len(subjects))
    callbacks = [SubjectGrouping(subjects, max_share=0.5, seed=1)] if grouped else []
    keys = [subject or f"row-{row}" for row, subject in enumerate(subjects)] if keyed else None
    train = DataLoader(datasets()[0], BATCH, shuffle=True)
    return record(folder, callbacks=callbacks, train=train, sample_keys=keys, epochs=4)


def placed(store, ids):
    steps, counts = store.counts_of(ids)
    return len(steps), counts.mean()


def test_a_subject_gets_a_subject(tmp_path):
    store = recorded(tmp_path, grouped=True, keyed=True).store
    found = placebo_request(store, DeletionRequest(["user-1"]))
    assert found.sample_ids in (("user-0",), ("user-2",))
    assert placed(store, found.sample_ids) == placed(store, ["user-1"]) == (4, 4.0)
    assert placebo_request(store, DeletionRequest(["user-1"])) == found


def test_grouped_positions_get_companions(tmp_path):
    store = recorded(tmp_path, grouped=True, keyed=False).store
    found = placebo_request(store, DeletionRequest([0, 1, 2, 3]))
    assert set(found.sample_ids) in ({4, 5, 6, 7}, {8, 9, 10, 11})


def test_scattered_positions_get_scattered_ones(tmp_path):
    store = recorded(tmp_path, grouped=False, keyed=False).store
    asked = [0, 20, 40]
    found = placebo_request(store, DeletionRequest(asked), seed=5)
    assert len(found.sample_ids) == 3
    assert not set(found.sample_ids) & set(asked)
    steps, share = placed(store, found.sample_ids)
    wanted_steps, wanted_share = placed(store, asked)
    assert abs(steps - wanted_steps) <= 2
    assert abs(share - wanted_share) <= 0.3


def test_nobody_is_alike(tmp_path):
    store = recorded(tmp_path, grouped=True, keyed=True, sizes=(4,)).store
    with pytest.warns(UnlearningWarning, match="placed like"):
        found = placebo_request(store, DeletionRequest(["user-0"]))
    assert found.sample_ids[0].startswith("row-")


def test_refusals(tmp_path):
    store = recorded(tmp_path, grouped=False, keyed=False).store
    with pytest.raises(DeletionRequestError, match="recorded"):
        placebo_request(store, DeletionRequest([99]))
    with pytest.raises(DeletionRequestError, match="left"):
        placebo_request(store, DeletionRequest(range(40)))
