"""The penalty and its fading coefficient."""

import pytest
import torch

from lightning_unlearn.functional.sparsity import fading, l1_norm


def test_the_norm_and_its_gradient():
    tensors = [torch.tensor([[1.0, -2.0], [0.0, 3.0]]).requires_grad_(), torch.tensor([-0.5]).requires_grad_()]
    total = l1_norm(tensors)
    assert total.item() == 6.5
    total.backward()
    assert tensors[0].grad.tolist() == [[1.0, -1.0], [0.0, 1.0]]
    assert tensors[1].grad.tolist() == [-1.0]
    assert float(l1_norm([])) == 0.0


@pytest.mark.parametrize("rest", [0, 3, 10])
def test_the_official_rule(rest):
    epochs, alpha = 10, 0.2
    for epoch in range(epochs):
        if epochs - rest == 0:
            wanted = alpha
        elif epoch < epochs - rest:
            wanted = alpha * (1 - epoch / (epochs - rest))
        else:
            wanted = 0.0
        assert fading(alpha, epoch, epochs, rest) == pytest.approx(wanted)
