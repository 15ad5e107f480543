"""LeaveOut: the user's own batches, thinned, whatever arranges them and whoever listens."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.callbacks.leave_out import LeaveOut
from lightning_unlearn.callbacks.subject_grouping import SubjectGrouping
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer


def seen(train_loader, *callbacks, epochs=2):
    torch.manual_seed(7)
    model = BoringClassifier()
    quiet_trainer(max_epochs=epochs, callbacks=list(callbacks)).fit(model, train_loader)
    return model.seen


def thinned(batches, left_out):
    kept = [[row for row in batch if row not in left_out] for batch in batches]
    return [batch for batch in kept if batch]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_without_the_samples(workers):
    whole = seen(loader(num_workers=workers))
    assert seen(loader(num_workers=workers), LeaveOut([1, 2, 3])) == thinned(whole, {1, 2, 3})


def test_a_batch_sampler_whose_batch_becomes_empty():
    def batches():
        return DataLoader(IdDataset(12), batch_sampler=BatchSampler(SequentialSampler(range(12)), 4, drop_last=False))

    assert seen(batches(), LeaveOut([4, 5, 6, 7]), epochs=1) == [[0, 1, 2, 3], [8, 9, 10, 11]]


def test_behind_grouping_and_before_the_recorder(tmp_path):
    subjects = [f"user-{row // 8}" for row in range(40)]
    whole = seen(loader(), SubjectGrouping(subjects, seed=3))
    recorder = DeltaRecorder(tmp_path / "store")
    # The order of the callbacks does not matter.
    got = seen(loader(), recorder, LeaveOut([0, 9]), SubjectGrouping(subjects, seed=3))
    assert got == thinned(whole, {0, 9})
    store = DeltaStore.open(tmp_path / "store")
    assert [sorted(store.record(step).sample_ids) for step in range(store.n_steps)] == [sorted(batch) for batch in got]


def test_nothing_is_left_behind():
    data = loader()
    trainer = quiet_trainer(max_epochs=1, callbacks=[LeaveOut([1])])
    trainer.fit(BoringClassifier(), data)
    assert "process_dataloader" not in vars(trainer.strategy)
    assert sorted(row for batch in data for row in batch["index"].tolist()) == list(range(40))


def test_iterable_data_is_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(UnsupportedStrategyError, match="iterable"):
        seen(DataLoader(Stream(), batch_size=2), LeaveOut([1]))
