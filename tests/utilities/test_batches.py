from dataclasses import dataclass

import pytest
import torch

from lightning_unlearn.utilities.batches import leading_size


@dataclass
class Pair:
    name: str
    x: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(4, 2), 4),
        ([torch.zeros(3), torch.zeros(5)], 3),
        ({"scale": torch.tensor(1.0), "x": (torch.zeros(6, 1),)}, 6),
        (Pair("n", torch.zeros(2, 2)), 2),
        ({"key": ["a", "b"]}, None),
        (None, None),
    ],
)
def test_first_dimension_of_the_first_tensor(batch, size):
    assert leading_size(batch) == size
