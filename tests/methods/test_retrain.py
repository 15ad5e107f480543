"""Going back to the initial weights: what is restored, what is reset, and what is nobody's business."""

import pytest
import torch
from torch import nn

from lightning_unlearn.methods.retrain import restore_initial_weights
from lightning_unlearn.utilities.parameters import float_buffers


class Attention(nn.Module):
    """What language models keep in integer and boolean buffers, next to BatchNorm's counter."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("positions", torch.arange(4))
        self.register_buffer("mask", torch.ones(4, 4).tril().bool())
        self.register_buffer("scale", torch.ones(3))


def moved():
    module = Attention()
    initial = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    initial |= {name: tensor.clone() for name, tensor in float_buffers(module).items()}
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.norm(torch.randn(5, 3))
    with torch.no_grad():
        module.scale.add_(1.0)
        for parameter in module.parameters():
            parameter.add_(1.0)
    return module, initial, expected


def test_the_module_is_as_it_was_constants_included():
    module, initial, expected = moved()
    assert int(module.norm.num_batches_tracked) == 1
    restore_initial_weights(module, initial)
    found = module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_missing_parameter_is_told_before_anything_changes():
    module, initial, _ = moved()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    del initial["head.bias"]
    with pytest.raises(ValueError, match=r"head\.bias"):
        restore_initial_weights(module, initial)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
