import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    random_split,
)

from lightning_unlearn.data.grouping import SubjectGroupedBatchSampler
from lightning_unlearn.data.samplers import CyclingDistributedSampler
from lightning_unlearn.data.splits import check_splittable, positions_of, split_positions, subset_loader
from lightning_unlearn.exceptions import DeletionRequestError, UnsupportedStrategyError

N = 23
RETAIN = [i for i in range(N) if i not in (3, 4, 10, 22)]
FORGET = [3, 4, 10, 22]


class Numbers(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        return torch.tensor(index)


class Listwise(Dataset):
    """Indexed with whole lists, as tensors in memory often are."""

    values = torch.arange(N)

    def __len__(self):
        return N

    def __getitem__(self, indices):
        return self.values[indices]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(N))


class EvensFirst(Sampler):
    def __iter__(self):
        return iter([*range(0, N, 2), *range(1, N, 2)])

    def __len__(self):
        return N


class Pairs(Sampler):
    """A batch sampler of the user's own."""

    def __iter__(self):
        return iter([[i, N - 1 - i] for i in range(N // 2)] + [[N // 2]])

    def __len__(self):
        return N // 2 + 1


class PlainSubclass(DataLoader):
    pass


def flat(loader):
    return [int(item) for batch in loader for item in batch.reshape(-1)]


def sizes(loader):
    return [len(batch) for batch in loader]


# ---- every branch sees exactly its part ----


def loaders():
    data = Numbers()
    return {
        "plain": DataLoader(data, batch_size=4, shuffle=True),
        "sequential": DataLoader(data, batch_size=4),
        "explicit batch sampler": DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False)),
        "own sampler": DataLoader(data, batch_size=4, sampler=EvensFirst()),
        "custom batch sampler": DataLoader(data, batch_sampler=Pairs()),
        "grouped": DataLoader(data, batch_sampler=SubjectGroupedBatchSampler([i // 3 for i in range(N)], 4)),
        "no batching": DataLoader(data, batch_size=None, shuffle=True),
        "lists": DataLoader(Listwise(), batch_size=None, sampler=BatchSampler(RandomSampler(data), 4, False)),
        "subset random sampler": DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(range(N))),
        "subclass": PlainSubclass(data, batch_size=4, shuffle=True),
    }


@pytest.mark.parametrize("name", loaders())
@pytest.mark.parametrize("part", ["forget", "retain", None])
def test_each_part_holds_its_samples_once_per_pass(name, part):
    positions = RETAIN if part != "forget" else FORGET
    loader = subset_loader(loaders()[name], positions, part=part)
    for _ in range(2):
        assert sorted(flat(loader)) == positions


@pytest.mark.parametrize("name", set(loaders()) - {"no batching", "custom batch sampler"})
def test_batch_size_is_taken_over(name):
    assert sizes(subset_loader(loaders()[name], RETAIN, part="retain")) == [4, 4, 4, 4, 3]


@pytest.mark.parametrize("name", set(loaders()) - {"lists"})
def test_evaluation_form_is_in_order(name):
    assert flat(subset_loader(loaders()[name], RETAIN, part=None)) == RETAIN


def test_shuffling_is_kept_for_retain_and_given_to_forget():
    sequential = loaders()["sequential"]
    assert flat(subset_loader(sequential, RETAIN, part="retain")) == RETAIN
    orders = [flat(subset_loader(sequential, FORGET, part="forget")) for _ in range(8)]
    assert len(set(map(tuple, orders))) > 1
    orders = [flat(subset_loader(loaders()["plain"], RETAIN, part="retain")) for _ in range(2)]
    assert orders[0] != orders[1]


def test_own_sampler_keeps_its_order():
    loader = subset_loader(loaders()["own sampler"], RETAIN, part="retain")
    assert flat(loader) == [i for i in EvensFirst() if i in RETAIN]
    assert len(loader) == 5


def test_custom_batches_are_thinned_for_retain():
    thinned = [batch.tolist() for batch in subset_loader(loaders()["custom batch sampler"], RETAIN, part="retain")]
    assert thinned == [kept for batch in Pairs() if (kept := [i for i in batch if i in RETAIN])]


def test_weights_follow_the_samples_and_are_ignored_for_forget():
    weights = torch.zeros(N)
    weights[[0, 5]] = 1.0
    loader = DataLoader(Numbers(), batch_size=4, sampler=WeightedRandomSampler(weights, N))
    drawn = flat(subset_loader(loader, RETAIN, part="retain"))
    assert set(drawn) == {0, 5}
    assert len(drawn) == len(RETAIN)
    assert sorted(flat(subset_loader(loader, FORGET, part="forget"))) == FORGET


def test_draws_with_replacement_stay_such():
    sampler = RandomSampler(Numbers(), replacement=True, num_samples=60)
    drawn = flat(subset_loader(DataLoader(Numbers(), sampler=sampler, batch_size=4), RETAIN, part="retain"))
    assert len(drawn) == 60
    assert set(drawn) <= set(RETAIN)


def test_a_users_distributed_sampler_is_rebuilt_on_the_part():
    own = DistributedSampler(Numbers(), num_replicas=2, rank=1, shuffle=False, seed=9)
    loader = subset_loader(DataLoader(Numbers(), batch_size=4, sampler=own), RETAIN, part="retain")
    sampler = loader.sampler
    assert isinstance(sampler, CyclingDistributedSampler)
    assert (sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed) == (2, 1, False, 9)
    assert flat(loader) == [RETAIN[i] for i in [*range(1, len(RETAIN), 2), 0]]


def test_replicas_shard_both_parts():
    for part, positions in (("retain", RETAIN), ("forget", FORGET)):
        shards = [flat(subset_loader(loaders()["plain"], positions, part=part, replicas=(2, rank))) for rank in (0, 1)]
        assert sorted(set(shards[0]) | set(shards[1])) == positions
        assert len(set(shards[0]) & set(shards[1])) == len(positions) % 2


@pytest.mark.parametrize("name", ["custom batch sampler", "lists"])
def test_batches_of_the_users_own_cannot_be_shared_out(name):
    with pytest.raises(UnsupportedStrategyError, match="without a batch sampler of its own"):
        subset_loader(loaders()[name], RETAIN, part="retain", replicas=(2, 0))


# ---- last batches ----


def test_forget_never_drops_a_batch():
    loader = DataLoader(Numbers(), batch_size=8, shuffle=True, drop_last=True)
    assert sorted(flat(subset_loader(loader, FORGET, part="forget"))) == FORGET


def test_retain_drops_as_the_user_did_unless_nothing_were_left():
    loader = DataLoader(Numbers(), batch_size=8, shuffle=True, drop_last=True)
    assert sizes(subset_loader(loader, RETAIN, part="retain")) == [8, 8]
    assert sizes(subset_loader(loader, RETAIN[:5], part="retain")) == [5]


def test_a_single_left_over_retain_sample_is_left_out():
    loader = DataLoader(Numbers(), batch_size=6, shuffle=True)
    assert sizes(subset_loader(loader, RETAIN, part="retain")) == [6, 6, 6]  # 19 = 3 * 6 + 1
    assert sizes(subset_loader(loader, RETAIN, part=None)) == [6, 6, 6, 1]
    assert sizes(subset_loader(loader, RETAIN[:1], part="retain")) == [1]


# ---- what is carried over ----


def collate(samples):
    return torch.stack(samples) * 1


def worker(rank):
    torch.manual_seed(rank)


def test_settings_are_carried_and_the_generator_is_cloned():
    generator = torch.Generator().manual_seed(7)
    loader = DataLoader(
        Numbers(),
        batch_size=4,
        shuffle=True,
        num_workers=2,
        collate_fn=collate,
        worker_init_fn=worker,
        persistent_workers=True,
        prefetch_factor=3,
        timeout=60,
        generator=generator,
    )
    state = generator.get_state()
    part = subset_loader(loader, RETAIN, part="retain")
    names = ("num_workers", "collate_fn", "worker_init_fn", "persistent_workers", "prefetch_factor", "timeout")
    assert {name: getattr(part, name) for name in names} == {name: getattr(loader, name) for name in names}
    assert sorted(flat(part)) == RETAIN
    assert sorted(flat(part)) == RETAIN  # the workers are still there
    assert torch.equal(generator.get_state(), state)
    del part._iterator


def test_a_seed_fixes_the_order():
    first, again, other = (
        flat(subset_loader(loaders()["plain"], RETAIN, part="retain", seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


# ---- ids ----


def test_positions_count_in_the_underlying_dataset():
    data = Numbers()
    train, rest = random_split(data, [15, 8], generator=torch.Generator().manual_seed(0))
    for position in train.indices:
        [found] = positions_of([position], train)
        assert int(train[int(found)]) == position
    with pytest.raises(DeletionRequestError, match=r"unknown ones: \d+"):
        positions_of([rest.indices[0]], train)
    both = ConcatDataset([Subset(data, [7, 8]), Subset(data, [1, 7])])
    assert positions_of([7], both).tolist() == [0, 3]  # oversampled: every copy


def test_keys_name_all_their_rows():
    keys = [f"user-{i // 5}" for i in range(N)]
    assert positions_of(["user-1", "user-4"], Numbers(), keys).tolist() == [5, 6, 7, 8, 9, 20, 21, 22]
    assert positions_of(["user-1"], Subset(Numbers(), [9, 0, 5]), keys).tolist() == [0, 2]
    assert positions_of(["user-1"], Numbers(), dict(enumerate(keys))).tolist() == [5, 6, 7, 8, 9]
    assert positions_of(["user-1"], Numbers(), keys.__getitem__).tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("ids", "keys", "message"),
    [
        ([], None, "at least one sample id"),
        ([1, N], None, f"unknown ones: {N}"),
        ([-1], None, "unknown ones: -1"),
        ([2, 2], None, "got twice: 2"),
        (["a"], None, "pass `sample_keys`"),
        ([True], None, "positions in the dataset"),
        ([1.5], None, "positions in the dataset"),
        ("abc", None, "a collection of sample ids"),
        (["a", "z"], ["a"] * N, "sample keys of the training data .* unknown ones: 'z'"),
    ],
)
def test_ids_that_cannot_be_met_are_refused(ids, keys, message):
    with pytest.raises(DeletionRequestError, match=message):
        positions_of(ids, Numbers(), keys)


def test_split_is_a_partition_of_what_the_loader_draws():
    forget, retain = split_positions(loaders()["plain"], np.array(FORGET))
    assert forget.tolist() == FORGET
    assert retain.tolist() == RETAIN
    bounded = DataLoader(Numbers(), batch_size=4, sampler=SubsetRandomSampler([3, 8, 1, 4]))
    forget, retain = split_positions(bounded, [3])
    assert (forget.tolist(), retain.tolist()) == ([3], [1, 4, 8])
    with pytest.raises(DeletionRequestError, match="SubsetRandomSampler: 5"):
        split_positions(bounded, [5])


# ---- what cannot be split ----


def test_data_without_positions_is_refused():
    with pytest.raises(UnsupportedStrategyError, match="map-style"):
        subset_loader(DataLoader(Stream()), [1], part="retain")
    with pytest.raises(UnsupportedStrategyError, match="one torch DataLoader"):
        check_splittable([DataLoader(Numbers())])
    assert isinstance(check_splittable(DataLoader(Numbers())).sampler, SequentialSampler)


@pytest.mark.parametrize("positions", [[], [-1], [N]])
def test_positions_outside_the_dataset_are_refused(positions):
    with pytest.raises(DeletionRequestError, match="at least one position below"):
        subset_loader(loaders()["plain"], positions, part="retain")
