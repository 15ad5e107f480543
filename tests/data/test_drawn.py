"""Random parts of an evaluation loader."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset, TensorDataset

from lightning_unlearn.data.drawn import drawn_loader
from lightning_unlearn.exceptions import UnsupportedStrategyError


def taken(loader):
    return [batch.tolist() for batch in loader]


def flat(loader):
    return [row for batch in taken(loader) for row in batch]


def test_all_of_it_is_the_loader_itself():
    loader = DataLoader(range(7), 3)
    assert taken(drawn_loader(loader)) == taken(drawn_loader(loader, 7)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert taken(drawn_loader(loader, single=True)) == [[row] for row in range(7)]


def test_a_draw_is_without_repeats_follows_its_seed_and_touches_no_global_state():
    loader = DataLoader(Subset(range(100, 300), range(0, 200, 2)), 8)
    state = torch.get_rng_state()
    loaders = [drawn_loader(loader, 40, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    draws = [flat(one) for one in loaders]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(set(draws[0]))
    assert len(draws[0]) == 40
    assert draws[0] != list(range(100, 180, 2))
    assert flat(drawn_loader(loader, 40, seed=0, single=True)) == draws[0]
    often = torch.zeros(300)
    for seed in range(200):
        often[flat(drawn_loader(loader, 25, seed=seed))] += 1
    assert 25 < float(often[100::2].min()) < float(often.max()) < 80


def test_collating_is_the_users_and_single_samples_stay_batches():
    data = TensorDataset(torch.arange(6.0)[:, None], torch.arange(6))
    loader = DataLoader(data, 4, collate_fn=lambda rows: {"x": torch.stack([x for x, _ in rows]), "n": len(rows)})
    found = list(drawn_loader(loader, 2, single=True))
    assert [batch["n"] for batch in found] == [1, 1]
    assert found[0]["x"].shape == (1, 1)


class Whole:
    """A dataset that takes a list of positions at once."""

    def __len__(self):
        return 5

    def __getitem__(self, rows):
        return torch.tensor(rows)


def test_datasets_indexed_with_lists_and_loaders_that_do_not_batch():
    lists = DataLoader(Whole(), batch_size=None, sampler=BatchSampler(SequentialSampler(range(5)), 2, False))
    assert taken(drawn_loader(lists, single=True)) == [[row] for row in range(5)]
    with pytest.raises(UnsupportedStrategyError, match="batch size"):
        drawn_loader(DataLoader(range(5), batch_size=None), single=True)
