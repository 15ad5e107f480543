"""Class numbers out of logits, and what is neither."""

import pytest
import torch

from lightning_unlearn.functional.predictions import class_numbers, predicted_classes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_output_wins_and_the_first_of_equal_ones(dtype):
    outputs = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0], [-1.0, -torch.inf, -0.5]], dtype=dtype)
    assert predicted_classes(outputs).tolist() == [1, 0, 2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_class_numbers_are_what_they_are(dtype):
    numbers = torch.tensor([3, 0, 200], dtype=dtype)
    for found in (class_numbers(numbers), predicted_classes(numbers)):
        assert found.dtype == torch.int64
        assert found.tolist() == [3, 0, 200]


@pytest.mark.parametrize(
    "outputs", [torch.rand(3), torch.ones(3, dtype=torch.bool), torch.ones(3, 2).long(), torch.rand(2, 0)]
)
def test_refuses_anything_else(outputs):
    with pytest.raises(ValueError, match=r"`answers`.*integer class numbers"):
        predicted_classes(outputs, "answers")
    with pytest.raises(ValueError, match=r"`targets`.*integer class numbers"):
        class_numbers(outputs)
