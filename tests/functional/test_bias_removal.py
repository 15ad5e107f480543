"""Which labels are still given, against a loop."""

import pytest
import torch

from lightning_unlearn.functional.bias_removal import bias_removal_error


def test_equal_a_loop_over_samples_in_both_forms():
    outputs, given = torch.randn(60, 4), torch.randint(4, (60,))
    answers = [max(range(4), key=row.__getitem__) for row in outputs.tolist()]
    expected = [float(answer == label) for answer, label in zip(answers, given.tolist(), strict=True)]
    assert 0 < sum(expected) < 60
    for form in (outputs, outputs.argmax(1)):
        found = bias_removal_error(form, given)
        assert found.dtype == torch.float64
        assert found.tolist() == expected


def test_refuses_labels_of_other_samples():
    with pytest.raises(ValueError, match="3 class numbers, but got 2"):
        bias_removal_error(torch.zeros(3, 2), torch.zeros(2).long())
    with pytest.raises(ValueError, match="given_targets"):
        bias_removal_error(torch.zeros(3, 2), torch.zeros(3))
