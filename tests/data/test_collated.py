"""Batches of any positions: as the user's own loader makes them."""

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from lightning_unlearn.data.collated import BatchMaker, batches_in_epoch
from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import UnsupportedStrategyError

DATA = TensorDataset(torch.arange(10), torch.arange(10) * 10)


class Named(list):
    """A dataset that fetches several items at once."""

    asked = ()

    def __getitems__(self, positions):
        self.asked = (*self.asked, tuple(positions))
        return [self[position] for position in positions]


def swapped(samples):
    x, y = zip(*samples, strict=True)
    return {"y": torch.stack(y), "x": torch.stack(x)}


def test_batches_go_through_the_users_collate_function_in_the_given_order():
    make = BatchMaker(UnlearningDataModule(DataLoader(DATA, 4, shuffle=True, collate_fn=swapped), forget=[2]))
    batch = make([7, 2, 7])
    assert batch["x"].tolist() == [7, 2, 7]
    assert batch["y"].tolist() == [70, 20, 70]


def test_items_are_fetched_together_where_the_dataset_does_so():
    data = Named(range(6))
    make = BatchMaker(UnlearningDataModule(DataLoader(data, 2), forget=[1]))
    assert make([3, 0]).tolist() == [3, 0]
    assert data.asked == ((3, 0),)


def test_hooks_of_the_datamodule_are_applied_and_random_states_are_not_moved():
    class Doubling(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(DATA, 4, shuffle=True)

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [2 * one for one in batch]

    data = UnlearningDataModule(Doubling(), forget=[1])
    make = BatchMaker(data)
    state = torch.get_rng_state()
    assert make([5])[0].tolist() == [10]
    assert torch.equal(torch.get_rng_state(), state)
    assert batches_in_epoch(data) == 3


def test_a_loader_that_does_not_batch_is_refused():
    listed = DataLoader(DATA, batch_size=None, sampler=BatchSampler(SequentialSampler(DATA), 2, drop_last=False))
    with pytest.raises(UnsupportedStrategyError, match="put samples together"):
        BatchMaker(UnlearningDataModule(listed, forget=[1]))
