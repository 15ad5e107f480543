import random

import numpy as np
import torch

from lightning_unlearn.utilities.rng import capture_rng


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).tolist()  # noqa: NPY002


def test_the_same_numbers_come_again():
    draw()  # leaves second halves of pairs of Gaussian numbers behind
    state = capture_rng()
    first = draw()
    assert draw() != first
    state.restore()
    assert draw() == first


def test_capturing_does_not_draw():
    torch.manual_seed(1)
    want = torch.rand(2)
    torch.manual_seed(1)
    capture_rng()
    assert torch.equal(torch.rand(2), want)
