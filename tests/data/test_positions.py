import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, Subset, random_split

from lightning_unlearn.data.sample_ids import resolve_keys, root_length, root_positions
from lightning_unlearn.exceptions import DeletionRequestError, UnsupportedStrategyError


class Plain(Dataset):
    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


class Endless(Dataset):
    def __getitem__(self, index):
        return index


@st.composite
def wrapped(draw, depth=3):
    """A nest of subsets and concatenations over two datasets whose values are their own global positions."""
    roots = draw(st.shared(st.builds(lambda: (Plain(list(range(7))), Plain(list(range(7, 12))))), key="roots"))
    kind = draw(st.sampled_from(["root", "subset", "concat"] if depth else ["root"]))
    if kind == "root":
        return roots[draw(st.integers(0, 1))]
    inner = draw(wrapped(depth=depth - 1))
    if kind == "concat":
        return ConcatDataset([inner, draw(wrapped(depth=depth - 1))])
    return Subset(inner, draw(st.lists(st.integers(-len(inner), len(inner) - 1), min_size=1, max_size=8)))


@given(wrapped())
def test_positions_lead_to_the_same_content(dataset):
    positions = root_positions(dataset)
    contents = [dataset[index] for index in range(len(dataset))]
    if positions is None:
        assert isinstance(dataset, Plain)
        return
    # The underlying datasets, one after the other in the order of first occurrence.
    first_seen = list(dict.fromkeys("low" if value < 7 else "high" for value in _roots_in_order(dataset)))
    joined = [value for name in first_seen for value in (range(7) if name == "low" else range(7, 12))]
    assert [joined[position] for position in positions] == contents
    assert root_length(dataset) == len(joined)


def _roots_in_order(dataset):
    if isinstance(dataset, Subset):
        return _roots_in_order(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return [value for part in dataset.datasets for value in _roots_in_order(part)]
    return [dataset[0]]


def test_a_split_that_is_joined_again_gives_the_original_positions():
    data = Plain(list("abcdefghij"))
    first, second = random_split(data, [6, 4], generator=torch.Generator().manual_seed(0))
    joined = ConcatDataset([first, second])
    assert root_length(joined) == 10
    assert [data[position] for position in root_positions(joined)] == [joined[index] for index in range(10)]


def test_data_without_a_length():
    assert root_positions(Endless()) is None
    with pytest.raises(UnsupportedStrategyError, match="length"):
        root_length(Endless())
    assert root_positions(Subset(Endless(), [5, 2])).tolist() == [5, 2]


def test_keys_from_every_form():
    wanted = ["u0", "u0", "u1"]
    assert resolve_keys(wanted, 3) == wanted
    assert resolve_keys({2: "u1", 0: "u0", 1: "u0"}, 3) == wanted
    assert resolve_keys(lambda position: f"u{position // 2}", 3) == wanted
    assert resolve_keys(np.array([4, 5]), 2) == [4, 5]
    assert all(type(key) is int for key in resolve_keys(torch.tensor([4, 5]), 2))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["a"], "3 samples"),
        ({0: "a", 1: "b"}, "position 2"),
        ([1.0, 2.0, 3.0], "an int or a str"),
        ([True, False, True], "an int or a str"),
        (lambda position: None, "an int or a str"),
    ],
)
def test_bad_keys_are_refused(keys, match):
    with pytest.raises(DeletionRequestError, match=match):
        resolve_keys(keys, 3)
