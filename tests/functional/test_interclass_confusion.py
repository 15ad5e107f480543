"""IC-ERR and FGT-ERR against a loop over samples, and against the wrong readings."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from lightning_unlearn.functional.interclass_confusion import fgt_error, ic_error

N_CLASSES = 4

samples = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)
pairs = st.permutations(range(N_CLASSES)).map(lambda order: (order[0], order[1]))


@given(samples, pairs)
def test_equal_a_loop_over_samples(answers, classes):
    concerned = [(true, found) for true, found in answers if true in classes]
    wrong = sum(true != found for true, found in concerned)
    swapped = sum(found in classes and found != true for true, found in concerned)
    counts = torch.from_numpy(confusion_matrix(*zip(*answers, strict=True), labels=range(N_CLASSES)))
    error = ic_error(counts, classes)
    assert error.dtype == torch.float64
    assert error.item() == pytest.approx(wrong / len(concerned)) if concerned else math.isnan(error.item())
    assert fgt_error(counts, classes).item() == swapped
    assert fgt_error(counts, classes[::-1]).item() == swapped


def test_any_wrong_class_counts_and_rows_are_true_classes():
    counts = torch.tensor([[5, 1, 4], [0, 10, 0], [7, 7, 0]])
    assert ic_error(counts, (0, 1)).item() == 5 / 20
    assert fgt_error(counts, (0, 1)).item() == 1
    assert ic_error(counts.T, (0, 1)).item() != 5 / 20


@pytest.mark.parametrize("classes", [(0, 0), (0, 4), (-1, 1), (0,), (0, 1, 2), (0, True), (0, 1.0)])
def test_refuses_what_are_not_two_classes(classes):
    for function in (ic_error, fgt_error):
        with pytest.raises(ValueError, match="two different class numbers from 0 to 3"):
            function(torch.zeros(4, 4), classes)


def test_refuses_what_is_no_confusion_matrix():
    with pytest.raises(ValueError, match="square"):
        ic_error(torch.zeros(3, 4), (0, 1))
