"""A part of a training loader's data: every sample of it, in an order of the seed alone, with the user's hooks."""

import pickle

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_unlearn.data.plain_loaders import datamodule_of_loaders
from lightning_unlearn.data.selected import SelectedDataModule, drawn_positions, selected_loader
from lightning_unlearn.exceptions import UnsupportedStrategyError

N = 23
PART = [0, 2, 3, 5, 8, 9, 13, 16, 21]


def data(**settings):
    return DataLoader(torch.arange(N), **{"batch_size": 4, **settings})


def flat(loader):
    return [one for batch in loader for one in batch.tolist()]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("shuffle", [False, True])
def test_no_sample_is_dropped_but_by_the_user(size, shuffle, drop_last):
    for length in range(1, len(PART) + 1):
        part = selected_loader(data(batch_size=size, shuffle=shuffle, drop_last=drop_last), PART[:length], seed=1)
        batches = [batch.tolist() for batch in part]
        assert len(batches) == len(part)
        used = [one for batch in batches for one in batch]
        assert len(set(used)) == len(used)
        kept = length // size * size if drop_last and length >= size else length
        assert len(used) == kept
        assert set(used) <= set(PART[:length])
        if size > 1 and length > 1:
            assert all(len(batch) > 1 for batch in batches), "normalisation cannot be trained on one"
        if not shuffle:
            assert used == PART[:kept]


def test_the_order_is_of_the_seed_and_that_of_an_ordinary_loader():
    first, second = (selected_loader(data(shuffle=True), PART[:8], seed=7) for _ in range(2))
    ordinary = DataLoader(torch.tensor(PART[:8]), 4, shuffle=True, generator=torch.Generator().manual_seed(7))
    for _ in range(3):
        torch.rand(3)
        order = flat(first)
        assert order == flat(second) == flat(ordinary)
    assert flat(selected_loader(data(shuffle=True), PART[:8], seed=8)) != flat(
        selected_loader(data(shuffle=True), PART[:8], seed=7)
    )


def test_what_the_loader_draws_from():
    assert drawn_positions(data(shuffle=True)).tolist() == list(range(N))
    subset = data(sampler=SubsetRandomSampler([5, 3, 9]))
    assert drawn_positions(subset).tolist() == [3, 5, 9]
    assert sorted(flat(selected_loader(subset, [3, 9], seed=0))) == [3, 9]


def test_weights_and_replacement_are_kept():
    weights = torch.zeros(N)
    weights[[2, 5]] = 1.0
    part = selected_loader(data(sampler=WeightedRandomSampler(weights, 230)), PART, seed=0)
    drawn = flat(part)
    assert len(drawn) == 230 * len(PART) // N
    assert set(drawn) == {2, 5}
    part = selected_loader(data(sampler=RandomSampler(range(N), replacement=True, num_samples=46)), PART, seed=0)
    assert len(flat(part)) == 2 * len(PART)
    assert len(set(flat(part))) < 2 * len(PART)


def test_without_batches():
    part = selected_loader(DataLoader(torch.arange(N), batch_size=None), PART, seed=0)
    assert [int(one) for one in part] == PART


class Own(Sampler):
    def __iter__(self):
        return iter(range(N))

    def __len__(self):
        return N


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": Own()},
        {"batch_sampler": BatchSampler(Own(), 4, False), "batch_size": 1},
        {"batch_size": None, "sampler": BatchSampler(SequentialSampler(range(N)), 4, False)},
    ],
)
def test_samplers_that_cannot_be_seeded_are_refused(settings):
    with pytest.raises(UnsupportedStrategyError, match="torch's own samplers"):
        selected_loader(data(**settings), PART, seed=0)


class Users(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.calls = []
        self.loader = DataLoader(TensorDataset(torch.arange(N)), 4)

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append("setup")

    def teardown(self, stage):
        self.calls.append("teardown")

    def train_dataloader(self):
        return self.loader

    def val_dataloader(self):
        return "validation"

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return "transferred"


def test_the_datamodule_is_the_user_s_but_for_the_training_data():
    users = Users()
    selected = SelectedDataModule(users, users.loader, PART, 3)
    assert isinstance(selected, Users)
    assert selected.on_after_batch_transfer(None, 0) == "transferred"
    assert selected.val_dataloader() == "validation"
    selected.prepare_data()
    selected.setup("fit")
    selected.teardown("fit")
    assert users.calls == []
    assert [one for (batch,) in selected.train_dataloader() for one in batch.tolist()] == PART
    again = pickle.loads(pickle.dumps(selected))  # noqa: S301
    assert [one for (batch,) in again.train_dataloader() for one in batch.tolist()] == PART


def test_plain_loaders_are_hidden_no_more_by_the_attribute_that_holds_them():
    users = datamodule_of_loaders({"train": data(), "val": data(batch_size=5)})
    selected = SelectedDataModule(users, users.train_dataloader(), PART, 3)
    assert flat(selected.train_dataloader()) == PART
    assert selected.val_dataloader().batch_size == 5
    assert flat(users.train_dataloader()) == list(range(N))
