"""One restricted step after the other: what one has kept back is no business of the next."""

import torch
from torch.nn import Parameter

from lightning_unlearn.utilities.masked_updates import MaskedUpdate


def test_only_masked_entries_of_masked_parameters_are_put_back():
    first, second, free = (Parameter(torch.arange(3.0)) for _ in range(3))
    update = MaskedUpdate()
    update.begin({first: torch.tensor([True, False, True]), second: torch.zeros(3, dtype=torch.bool)})
    for one in (first, second, free):
        one.data.mul_(2.0).add_(1.0)
    update.end()
    assert first.tolist() == [1.0, 1.0, 5.0]
    assert second.tolist() == [0.0, 1.0, 2.0]
    assert free.tolist() == [1.0, 3.0, 5.0]


def test_a_step_that_is_not_restricted_is_left_alone():
    weight = Parameter(torch.zeros(2))
    update = MaskedUpdate()
    update.begin({weight: torch.tensor([True, False])})
    weight.data += 1.0
    update.end()
    weight.data += 1.0
    update.end()
    assert weight.tolist() == [2.0, 1.0]
    update.begin({weight: torch.tensor([False, False])})  # a step that a gradient scaler skips has no end
    update.begin({})
    weight.data += 1.0
    update.end()
    assert weight.tolist() == [3.0, 2.0]
