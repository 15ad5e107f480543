"""Telling samples apart by their inputs alone."""

import pytest
import torch

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.utilities.fingerprints import fingerprints

X = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_every_dtype_and_order(dtype):
    rows = torch.arange(6).unsqueeze(1).bitwise_and(torch.tensor([4, 2, 1])).to(dtype)
    found = fingerprints(rows, 6)
    assert len(set(found)) == 6
    order = torch.tensor([3, 0, 5])
    assert fingerprints(rows[order], 3) == [found[place] for place in order]
    assert all(0 <= number < 2**63 for number in found)


def test_all_tensors_with_a_row_for_each_sample_count():
    found = fingerprints({"x": X, "more": [X[:, 0, 0], "text"]}, 6)
    other = X[:, 0, 0].clone()
    other[2] += 1
    again = fingerprints({"x": X, "more": [other, "text"]}, 6)
    assert [place for place in range(6) if found[place] != again[place]] == [2]
    assert fingerprints((X, torch.zeros(())), 6) == fingerprints(X, 6) == fingerprints((X, torch.ones(5, 2)), 6)
    assert fingerprints(X.transpose(1, 2), 6) != fingerprints(X, 6)
    assert not set(fingerprints(X, 6, seed=1)) & set(fingerprints(X, 6))


def test_without_rows_there_is_nothing_to_go_by():
    with pytest.raises(MissingRequirementError, match="row for each of the 6 samples"):
        fingerprints({"x": torch.ones(5)}, 6)
