"""Lockstep: what is drawn depends on the seed and the place in the run; whatever the loader, and who else listens."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, LightningModule
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    get_worker_info,
)

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.callbacks.lockstep import Lockstep
from lightning_unlearn.callbacks.subject_grouping import SubjectGrouping
from lightning_unlearn.exceptions import DeletionRequestError, UnsupportedStrategyError
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.models import quiet_trainer

ROWS, BATCH = 20, 4


class Drawn(LightningModule):
    """Notes the rows of every batch, what came with them, and what is drawn in the hooks of a step."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batches, self.moved, self.drawn, self.epochs = [], [], [], []

    def on_train_epoch_start(self):
        self.epochs.append(random.random())

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            self.moved.append(float(torch.rand(())))
        return batch

    def training_step(self, batch, batch_idx):
        rows, noise = batch
        self.batches.append(dict(zip(rows.tolist(), noise.tolist(), strict=True)))
        self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))  # noqa: NPY002
        return self.layer(noise.reshape(-1, 1).float()).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validated(Drawn):
    """Draws in validation, too."""

    def validation_step(self, batch, batch_idx):
        torch.rand(batch_idx + 1)


class Noise:
    """Row and a number drawn for it."""

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return row, random.random()


def fit(loader, *callbacks, epochs=2, draws=0, validation=None, **settings):
    """`draws` numbers are drawn before, as by whatever else a program does."""
    random.random(), torch.rand(draws), np.random.rand(draws)  # noqa: NPY002
    module = Drawn() if validation is None else Validated()
    quiet_trainer(max_epochs=epochs, callbacks=list(callbacks), num_sanity_val_steps=0, **settings).fit(
        module, loader, validation
    )
    return module


def shuffled(**settings):
    return DataLoader(Noise(), BATCH, shuffle=True, **settings)


def without(batches, left_out, whole=False):
    kept = [{row: noise for row, noise in batch.items() if row not in left_out} for batch in batches]
    return [one for one, batch in zip(kept, batches, strict=True) if one and (not whole or len(one) == len(batch))]


def test_only_the_seed_decides():
    first, again, other = (fit(shuffled(), Lockstep(seed), draws=n) for n, seed in enumerate((1, 1, 2)))
    for name in ("batches", "moved", "drawn", "epochs"):
        assert getattr(first, name) == getattr(again, name)
        assert getattr(first, name) != getattr(other, name)
    assert len({noise for batch in first.batches for noise in batch.values()}) == 2 * ROWS
    assert len(set(first.drawn)) == len(set(first.moved)) == 10
    assert not set(first.moved) & {numbers[2] for numbers in first.drawn}


@pytest.mark.parametrize("unit", ["samples", "batches"])
def test_what_is_left_out_shifts_nothing(unit):
    def run(**left_out):
        return fit(shuffled(), Lockstep(3, unit=unit, **left_out), validation=DataLoader(range(9)))

    whole = run()
    lost = [*whole.batches[1], next(iter(whole.batches[3]))]
    thin = run(forget=lost)
    assert thin.batches == without(whole.batches, lost, whole=unit == "batches")
    kept = [
        number
        for number, batch in enumerate(whole.batches)
        if set(batch) - set(lost) and (unit == "samples" or not set(batch) & set(lost))
    ]
    assert len(kept) < 10
    assert thin.moved == [whole.moved[number] for number in kept]
    assert thin.drawn == [whole.drawn[number] for number in kept]
    assert thin.epochs == whole.epochs


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_make_no_difference(workers, context):
    # A loader keeps two batches for each worker in flight, so the number of workers is one of batches that are drawn
    # ahead, too.
    loader = shuffled(num_workers=workers, multiprocessing_context=context, persistent_workers=True)
    assert fit(loader, Lockstep(1, [2, 5])).batches == fit(shuffled(), Lockstep(1, [2, 5])).batches


def test_the_users_loader_is_as_it_was_and_so_is_the_random_state():
    generator = torch.Generator().manual_seed(1)
    loader = shuffled(generator=generator)
    attributes, state = dict(vars(loader)), generator.get_state()
    module = Drawn()
    trainer = quiet_trainer(callbacks=[Lockstep()])
    before = torch.get_rng_state(), random.getstate()
    trainer.fit(module, loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert dict(vars(loader)) == attributes
    assert torch.equal(generator.get_state(), state)
    assert "process_dataloader" not in vars(trainer.strategy)


def test_a_workers_own_set_up_meets_the_users_dataset():
    class Told(Noise):
        path = "none"

        def __getitem__(self, row):
            assert self.path == f"opened by {get_worker_info().id}"
            return super().__getitem__(row)

    def open_file(worker_id):
        get_worker_info().dataset.path = f"opened by {worker_id}"

    loader = DataLoader(Told(), BATCH, num_workers=1, worker_init_fn=open_file)
    assert len(fit(loader, Lockstep()).batches) == 10


def test_behind_grouping_and_before_the_recorder(tmp_path):
    subjects = [f"user-{row // 4}" for row in range(ROWS)]
    whole = fit(shuffled(), SubjectGrouping(subjects, seed=3), Lockstep())
    recorder = DeltaRecorder(tmp_path / "store", sample_keys=[f"row-{row}" for row in range(ROWS)])
    thin = fit(shuffled(num_workers=1), recorder, Lockstep(forget=[0, 9]), SubjectGrouping(subjects, seed=3))
    assert thin.batches == without(whole.batches, {0, 9})
    store = DeltaStore.open(tmp_path / "store")
    recorded = [set(store.record(step).sample_ids) for step in range(store.n_steps)]
    assert recorded == [{f"row-{row}" for row in batch} for batch in thin.batches]


class Listed(TensorDataset):
    """Indexed with lists, each of which is a batch."""

    def __getitem__(self, rows):
        return super().__getitem__(rows)[0], torch.rand(len(rows))


def test_without_batching_by_the_loader():
    def lists():
        data = Listed(torch.arange(ROWS))
        return DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), BATCH, drop_last=False))

    whole = fit(lists(), Lockstep(1))
    assert len(set(whole.batches[0].values())) == BATCH
    lost = list(whole.batches[2])
    assert fit(lists(), Lockstep(1, lost, unit="batches")).batches == without(whole.batches, lost, whole=True)

    class Single(Drawn):
        def training_step(self, batch, batch_idx):
            return super().training_step([torch.tensor([batch[0]]), torch.tensor([batch[1]])], batch_idx)

    runs = []
    for forget in ([], [7]):
        module = Single()
        quiet_trainer(callbacks=[Lockstep(1, forget)]).fit(module, DataLoader(Noise(), batch_size=None, shuffle=True))
        runs.append(module.batches)
    assert len(runs[0]) == 2 * ROWS
    assert runs[1] == without(runs[0], [7])


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`:UserWarning")
@pytest.mark.parametrize("own_generator", [False, True])
def test_loaders_that_are_made_anew_every_epoch(own_generator):
    generator = torch.Generator().manual_seed(4) if own_generator else None

    class Data(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Noise(), BATCH, shuffle=True, generator=generator)

    runs = []
    for forget in ([], [7]):
        module = Drawn()
        quiet_trainer(callbacks=[Lockstep(1, forget)], reload_dataloaders_every_n_epochs=1).fit(module, Data())
        runs.append(module.batches)
    assert runs[1] == without(runs[0], [7])
    assert [list(batch) for batch in runs[0][:5]] != [list(batch) for batch in runs[0][5:]]


def test_ids_are_positions_in_the_underlying_dataset_or_keys():
    part = Subset(Noise(), range(10, 20))
    assert {row for batch in fit(DataLoader(part, BATCH), Lockstep(0, [12])).batches for row in batch} == {
        10, 11, *range(13, 20)
    }  # fmt: skip
    keys = [f"user-{row // 5}" for row in range(ROWS)]
    seen = fit(shuffled(), Lockstep(0, ["user-1"], sample_keys=keys)).batches
    assert {row for batch in seen for row in batch} == {*range(5), *range(10, 20)}


def test_until_ends_the_run_and_says_whether_it_got_there():
    lockstep = Lockstep(1, until=(1, 2))
    module = fit(shuffled(), lockstep, epochs=5, min_epochs=4)
    assert len(module.batches) == 5 + 3
    assert lockstep.complete
    assert lockstep.last == (1, 2)
    lockstep = Lockstep(1, until=(1, 2))
    fit(shuffled(), lockstep, epochs=1)
    assert not lockstep.complete
    assert lockstep.last == (0, 4)


def test_contents_are_those_of_whole_batches():
    whole, thin = Lockstep(1), Lockstep(1, [3])
    batches = fit(shuffled(), whole).batches
    fit(shuffled(), thin)
    untouched = {(number // 5, number % 5) for number, batch in enumerate(batches) if 3 not in batch}
    assert whole.contents.keys() == {(epoch, number) for epoch in range(2) for number in (0, 1, 2, 4)}
    assert thin.contents == {place: text for place, text in whole.contents.items() if place in untouched}
    assert len(set(whole.contents.values())) == 8
    other = Lockstep(2)
    fit(shuffled(), other)
    assert not set(other.contents.values()) & set(whole.contents.values())


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_loaders_that_keep_their_place():
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    for workers in (0, 1):
        loader = torchdata.StatefulDataLoader(Noise(), BATCH, shuffle=True, num_workers=workers)
        assert fit(loader, Lockstep(1, [2])).batches == without(fit(loader, Lockstep(1)).batches, [2])


class Fetching(Drawn):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return functional.mse_loss(self.layer(batch[1].reshape(-1, 1).float()), torch.zeros(1, 1))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_what_cannot_be_kept_in_step_is_refused():
    with pytest.raises(UnsupportedStrategyError, match="`devices` to be 1 to train in lockstep, but got 2"):
        Lockstep().setup(SimpleNamespace(world_size=2), Drawn(), "fit")
    with pytest.raises(UnsupportedStrategyError, match="batch, batch_idx"):
        quiet_trainer(callbacks=[Lockstep()]).fit(Fetching(), shuffled())
    with pytest.raises(UnsupportedStrategyError, match="iterable Stream"):
        fit(DataLoader(Stream()), Lockstep())
    with pytest.raises(UnsupportedStrategyError, match="2 of them"):
        fit({"a": shuffled(), "b": shuffled()}, Lockstep())
    with pytest.raises(DeletionRequestError, match="unknown ones: 20"):
        fit(shuffled(), Lockstep(forget=[20]))
    with pytest.raises(ValueError, match="unit"):
        Lockstep(unit="epochs")
    with pytest.raises(ValueError, match="seed"):
        Lockstep(-1)


def test_a_fit_that_goes_on_is_refused(tmp_path):
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Drawn(), shuffled())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(UnsupportedStrategyError, match=r"but got .*one\.ckpt"):
        quiet_trainer(callbacks=[Lockstep()]).fit(Drawn(), shuffled(), ckpt_path=tmp_path / "one.ckpt")
