import pytest
import torch
from torch.utils.data import RandomSampler

from lightning_unlearn.data.samplers import CyclingDistributedSampler, FilteredBatchSampler, FilteredSampler


class Reversed:
    """A user's sampler that follows the epoch."""

    def __init__(self, length):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        start = self.epoch % self.length
        return iter([(start - i) % self.length for i in range(self.length)])

    def __len__(self):
        return self.length


def test_a_filtered_sampler_keeps_the_users_order_and_yields_places_in_the_subset():
    positions = [1, 4, 5, 9]
    sampler = FilteredSampler(Reversed(10), positions)
    assert [positions[i] for i in sampler] == [9, 5, 4, 1]
    sampler.set_epoch(5)
    assert [positions[i] for i in sampler] == [5, 4, 1, 9]


def test_declared_length_holds_for_draws_with_replacement():
    positions = list(range(0, 20, 2))
    sampler = FilteredSampler(RandomSampler(range(20), replacement=True, num_samples=20), positions)
    for _ in range(30):
        assert len(list(sampler)) == len(sampler)


def test_counting_the_length_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    FilteredSampler(RandomSampler(range(20)), [1, 2])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_policy_that_never_draws_the_part_ends():
    sampler = FilteredSampler([0, 1, 2], [7])
    assert len(sampler) == 0
    assert list(sampler) == []


def test_a_filtered_batch_sampler_thins_batches_and_skips_empty_ones():
    positions = [0, 1, 5]
    batches = list(FilteredBatchSampler([[5, 2], [3, 4], [1, 0]], positions))
    assert [[positions[i] for i in batch] for batch in batches] == [[5], [1, 0]]
    assert len(FilteredBatchSampler([[5, 2], [3, 4], [1, 0]], positions)) == 2


@pytest.mark.parametrize("length", [5, 8, 25])
def test_cycling_shards_are_disjoint_and_permuted_anew_in_every_pass(length):
    ranks = [CyclingDistributedSampler(range(length), 2, rank, shuffle=True, seed=3) for rank in (0, 1)]
    for sampler in ranks:
        sampler.set_epoch(4)
    passes = [[list(sampler) for sampler in ranks] for _ in range(3)]
    for zero, one in passes:
        assert set(zero) | set(one) == set(range(length))
        assert len(set(zero) & set(one)) == length % 2  # the one sample that evens the shards out
        assert len(zero) == len(one)
    assert passes[0] != passes[1] != passes[2]


def test_cycling_repeats_itself_for_the_same_epoch_and_seed():
    sampler = CyclingDistributedSampler(range(9), 2, 0, shuffle=True, seed=1)
    sampler.set_epoch(2)
    first = [list(sampler), list(sampler)]
    sampler.set_epoch(2)
    assert [list(sampler), list(sampler)] == first
    assert sampler.epoch == 2
