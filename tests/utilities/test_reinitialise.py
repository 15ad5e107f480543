"""What a module knew is gone from every parameter, and everything else is as it was."""

import copy

import torch
from torch import nn

from lightning_unlearn.utilities.reinitialise import reinitialise


class Keyed(nn.Module):
    """Begins with a certain pattern, of which shuffling would leave nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.eye_(self.weight)


class Embedded(nn.Module):
    """Has a parameter of its own that it cannot reset, a frozen layer and one with running statistics."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.arange(12.0).view(3, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.keyed = Keyed()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def taught():
    torch.manual_seed(3)
    module = Embedded()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter is not module.positions:
                parameter.add_(torch.randn_like(parameter) + 10)
        module.norm.running_mean.fill_(5.0)
    return module


def test_every_parameter_is_drawn_anew():
    module = taught()
    before = copy.deepcopy(module)
    state = torch.get_rng_state()
    reinitialise(module, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, new), (_, old) in zip(module.named_parameters(), before.named_parameters(), strict=True):
        assert not torch.equal(new, old), name
        assert new.requires_grad == old.requires_grad
        if name != "positions":
            assert new.abs().max() < 5, f"{name} still has what it was taught"
    assert torch.equal(module.positions.flatten().sort().values, before.positions.flatten())
    assert (module.norm.running_mean == 0).all()
    assert torch.equal(module.keyed.weight, torch.eye(4))


def test_a_seed_names_one_outcome():
    one, same, other = taught(), taught(), taught()
    for module, seed in ((one, 1), (same, 1), (other, 2)):
        reinitialise(module, seed)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.frozen.weight, other.frozen.weight)
    assert not torch.equal(one.positions, other.positions)
