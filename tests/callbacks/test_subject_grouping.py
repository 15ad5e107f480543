from collections import Counter

import pytest
import torch
from lightning import Callback, LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, Subset, WeightedRandomSampler

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.callbacks.subject_grouping import SubjectGrouping
from lightning_unlearn.data.grouping import SubjectGroupedBatchSampler
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer

SUBJECTS = ["ann"] * 4 + ["bob"] * 6 + [None] * 30


def expected_batches(epochs, subjects=SUBJECTS, batch_size=8, **kwargs):
    sampler = SubjectGroupedBatchSampler(subjects, batch_size, **kwargs)
    batches = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        batches += list(sampler)
    return batches


@pytest.mark.parametrize("recorder_first", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_grouped_and_recorded_whatever_the_order_of_callbacks(tmp_path, recorder_first, workers):
    callbacks = [SubjectGrouping(SUBJECTS, seed=3), DeltaRecorder(tmp_path / "store", 1.0)]
    module, data = BoringClassifier(), loader(num_workers=workers)
    sampler = data.batch_sampler
    trainer = quiet_trainer(callbacks=callbacks[::-1] if recorder_first else callbacks, max_epochs=3)
    trainer.fit(module, data)
    assert module.seen == expected_batches(3, seed=3)
    store = DeltaStore.open(tmp_path / "store")
    assert [list(store.record(step).sample_ids) for step in range(15)] == module.seen
    assert len(store.steps_of([0, 1, 2, 3])) == 3
    assert type(data) is DataLoader
    assert data.batch_sampler is sampler
    assert "process_dataloader" not in vars(trainer.strategy)


@pytest.mark.parametrize(
    "subjects",
    [SUBJECTS.__getitem__, {row: name for row, name in enumerate(SUBJECTS) if name}, iter(SUBJECTS)],
    ids=["function", "mapping", "iterator"],
)
def test_subjects_in_every_form_that_sample_keys_have(subjects):
    rows = [0, 1, 2, 3, *range(10, 30)]
    labels = [row % 3 for row in range(40)]
    module = BoringClassifier()
    grouping = SubjectGrouping(subjects, seed=3, labels=None if hasattr(subjects, "__next__") else labels)
    data = loader(Subset(IdDataset(), rows), batch_size=8)
    quiet_trainer(callbacks=[grouping], max_epochs=1).fit(module, data)
    expected = expected_batches(1, [SUBJECTS[row] for row in rows], seed=3)
    assert module.seen == [[rows[place] for place in batch] for batch in expected]


def test_subjects_that_are_none():
    with pytest.raises(ValueError, match="a sequence, a mapping or a function, but got 7"):
        SubjectGrouping(7)
    with pytest.raises(ValueError, match="40 samples of the underlying dataset, but got '3 labels'"):
        quiet_trainer(callbacks=[SubjectGrouping(SUBJECTS.__getitem__, labels=[0, 1, 2])]).fit(
            BoringClassifier(), loader()
        )


def test_with_persistent_workers_and_a_second_fit():
    data = loader(num_workers=1, persistent_workers=True)
    for seed in (1, 2):
        module = BoringClassifier()
        next(iter(data))  # the user's own workers are there before the fit
        quiet_trainer(callbacks=[SubjectGrouping(SUBJECTS, seed=seed)]).fit(module, data)
        assert module.seen == expected_batches(2, seed=seed)
    # Without the callback the loader shuffles on its own again.
    module = BoringClassifier()
    quiet_trainer().fit(module, data)
    assert module.seen not in [expected_batches(2, seed=seed) for seed in (1, 2)]
    assert sorted(row for batch in module.seen[:5] for row in batch) == list(range(40))


def test_subjects_of_the_underlying_data_behind_a_subset_and_a_datamodule():
    rows = [30, 2, 0, 35, 1, 3, 20, 21, 22, 23, 24, 25]

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader(Subset(IdDataset(), rows), batch_size=4)

    module = BoringClassifier()
    quiet_trainer(callbacks=[SubjectGrouping(SUBJECTS, max_share=1.0)], max_epochs=1).fit(module, datamodule=Data())
    assert sorted(row for batch in module.seen for row in batch) == sorted(rows)
    assert sorted(len(set(batch) & {0, 1, 2, 3}) for batch in module.seen) == [0, 0, 4]
    # One subject for each row of the subset itself says the same.
    again = BoringClassifier()
    grouping = SubjectGrouping([SUBJECTS[row] for row in rows], max_share=1.0)
    quiet_trainer(callbacks=[grouping], max_epochs=1).fit(again, datamodule=Data())
    assert again.seen == module.seen


def test_drop_last_is_kept():
    module = BoringClassifier()
    quiet_trainer(callbacks=[SubjectGrouping(SUBJECTS)]).fit(module, loader(batch_size=12, drop_last=True))
    assert module.seen == expected_batches(2, batch_size=12, drop_last=True)
    assert {len(batch) for batch in module.seen} == {12}


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), "Stream"),
        (lambda: loader(batch_sampler=[[0, 1], [2, 3]]), "list"),
        (lambda: DataLoader(IdDataset(), batch_size=None), "NoneType"),
        (lambda: loader(sampler=WeightedRandomSampler([1.0] * 40, 40)), "WeightedRandomSampler"),
        (lambda: [loader(), loader()], "2 of them"),
    ],
)
def test_other_loaders_are_refused_before_training(data, match):
    module = BoringClassifier()
    trainer = quiet_trainer(callbacks=[SubjectGrouping(SUBJECTS)])
    with pytest.raises(UnsupportedStrategyError, match=match):
        trainer.fit(module, data())
    assert not module.seen
    assert "process_dataloader" not in vars(trainer.strategy)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="labels"):
        SubjectGrouping(SUBJECTS, labels=[1])
    with pytest.raises(ValueError, match="max_share"):
        SubjectGrouping(SUBJECTS, max_share=0)
    with pytest.raises(ValueError, match="40 samples"):
        quiet_trainer(callbacks=[SubjectGrouping(SUBJECTS[:-1])]).fit(BoringClassifier(), loader())


def ddp():
    torch.manual_seed(0)
    module = BoringClassifier()
    trainer = quiet_trainer(strategy="ddp", devices=2, callbacks=[SubjectGrouping(SUBJECTS)])
    trainer.fit(module, loader(batch_size=4))
    return module.seen


def test_two_processes_share_grouped_global_batches(gloo_pool):
    first, second = gloo_pool.run(ddp)
    assert [first, second] == [expected_batches(2, batch_size=4, num_replicas=2, rank=rank) for rank in range(2)]
    steps = [Counter(SUBJECTS[row] for row in one + two) for one, two in zip(first, second, strict=True)]
    assert sorted(step["ann"] for step in steps[:5]) == [0, 0, 0, 0, 4]
    assert sorted(row for one, two in zip(first[:5], second[:5], strict=True) for row in one + two) == list(range(40))


class SaveAndStop(Callback):
    def __init__(self, path, batches):
        self.path, self.batches, self.count = path, batches, 0

    def on_train_batch_end(self, trainer, *args):
        self.count += 1
        if self.count == self.batches:
            trainer.save_checkpoint(self.path)
            raise KeyError("stop")


class Scheduled(BoringClassifier):
    """A module that wants to know how long the training is, so that loaders are built before anything else is known."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 15
        return super().configure_optimizers()


@pytest.mark.parametrize("kind", [BoringClassifier, Scheduled])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [1, 3, 7])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_run_that_goes_on_in_mid_epoch_trains_on_the_rest_of_the_epoch(tmp_path, batches, workers, kind):
    first, second = kind(), kind()
    stop = SaveAndStop(tmp_path / "mid.ckpt", batches)
    callbacks = [SubjectGrouping(SUBJECTS), DeltaRecorder(tmp_path / "s"), stop]
    with pytest.raises(KeyError, match="stop"):
        quiet_trainer(callbacks=callbacks, max_epochs=3).fit(first, loader(num_workers=workers))
    trainer = quiet_trainer(callbacks=[SubjectGrouping(SUBJECTS), DeltaRecorder(tmp_path / "s")], max_epochs=3)
    trainer.fit(second, loader(num_workers=workers), ckpt_path=tmp_path / "mid.ckpt")
    assert first.seen + second.seen == expected_batches(3)
    store = DeltaStore.open(tmp_path / "s")
    assert [list(store.record(step).sample_ids) for step in range(store.n_steps)] == expected_batches(3)


def test_a_run_that_goes_on_after_an_epoch_begins_the_next_one(tmp_path):
    first, second = BoringClassifier(), BoringClassifier()
    trainer = quiet_trainer(callbacks=[SubjectGrouping(SUBJECTS)], max_epochs=1)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    resumed = quiet_trainer(callbacks=[SubjectGrouping(SUBJECTS)], max_epochs=3)
    resumed.fit(second, loader(), ckpt_path=tmp_path / "end.ckpt")
    assert first.seen + second.seen == expected_batches(3)
