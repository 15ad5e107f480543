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


class Scheduled(BoringClassifier):
    """Notes what an epoch leads to: rates, validations, and the number of optimizer steps."""

    def __init__(self):
        super().__init__()
        self.rates, self.validated, self.steps = [], 0, []

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def on_train_epoch_start(self):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        self.steps.append(self.trainer.global_step)

    def validation_step(self, batch, batch_idx):
        self.validated += batch_idx == 0


@pytest.mark.parametrize("workers", [0, 1])  # a worker draws the first epoch before the Trainer has counted batches
@pytest.mark.parametrize("left_out", [range(4, 8), range(8, 12), [0, 1, 2, 3, 8, 9, 10, 11]], ids=str)
def test_an_epoch_with_fewer_batches_ends_as_any_other(left_out, workers):
    def fit(callbacks, accumulate):
        torch.manual_seed(0)
        module = Scheduled()
        batches = DataLoader(IdDataset(12), batch_size=4, num_workers=workers)
        settings = {"accumulate_grad_batches": accumulate, "num_sanity_val_steps": 0}
        quiet_trainer(max_epochs=3, callbacks=callbacks, **settings).fit(
            module, batches, DataLoader(IdDataset(4), batch_size=4)
        )
        return module

    kept = 3 - len(left_out) // 4
    for accumulate in (1, 2):
        whole, thin = fit([], accumulate), fit([LeaveOut(left_out)], accumulate)
        assert thin.rates == whole.rates == [1.0, 0.5, 0.25]
        assert thin.validated == whole.validated == 3
        assert thin.steps == [epoch * -(-kept // accumulate) for epoch in range(3)]


@pytest.mark.parametrize("limit", [5, 0.55])
@pytest.mark.parametrize("workers", [0, 2])
def test_of_a_limited_epoch_no_more_is_seen_than_the_original_saw(workers, limit):
    def fit(*callbacks):
        torch.manual_seed(7)
        model = BoringClassifier()
        batches = DataLoader(IdDataset(40), batch_size=4, num_workers=workers)
        quiet_trainer(max_epochs=2, limit_train_batches=limit, callbacks=list(callbacks)).fit(model, batches)
        return model.seen

    assert len(fit()) == 10
    assert fit(LeaveOut(range(4, 8))) == thinned(fit(), set(range(4, 8)))


def test_iterable_data_is_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(UnsupportedStrategyError, match="iterable"):
        seen(DataLoader(Stream(), batch_size=2), LeaveOut([1]))
