"""Methods that compute a change of the weights, on small modules, and what they compute from."""

from contextlib import contextmanager

import torch
from lightning import LightningModule
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.methods.base import EditContext
from lightning_unlearn.modules.gradients import differentiable

FEATURES, CLASSES, ROWS = 4, 3, 30
FORGET = [1, 4, 9, 16, 25]


class Softmax(LightningModule):
    """A convex classifier: one linear layer, with an L2 penalty so that its minimum is a point."""

    def __init__(self, penalty=0.0, hidden=None):
        super().__init__()
        layers = [nn.Linear(FEATURES, CLASSES)]
        if hidden:
            layers = [nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for layer in layers[::2]:
                layer.reset_parameters()
        self.net = nn.Sequential(*layers).double()
        self.fixed = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
        self.penalty = penalty

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        return loss + self.penalty / 2 * sum(one.square().sum() for one in self.net.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def dataset(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x[:, :CLASSES].argmax(1) + torch.randint(0, 2, (ROWS,), generator=generator)) % CLASSES)


def rows(positions=None, seed=0):
    x, y = dataset(seed).tensors
    chosen = list(range(ROWS)) if positions is None else list(positions)
    return x[chosen], y[chosen]


def kept():
    return [row for row in range(ROWS) if row not in FORGET]


def split(batch_size=8, forget=FORGET):
    return UnlearningDataModule(DataLoader(dataset(), batch_size, shuffle=True), forget)


@contextmanager
def edit_context(module, data=None, **settings):
    """What `unlearn` hands to an edit."""
    with differentiable(module) as (loss, outputs):
        yield EditContext(module, None, None, data or split(), loss=loss, outputs=outputs, **settings)


def edit_of(method, module, data=None, **settings):
    """The change a method computes; the module must be as it was afterwards."""
    before = {name: one.clone() for name, one in module.state_dict().items()}
    with edit_context(module, data, **settings) as context:
        change = method.compute_edit(context)
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())
    assert all(one.grad is None for one in module.parameters())
    return change


def flat(change):
    return torch.cat([one.flatten() for one in change.values()])


def minimised(module, positions, steps=200):
    """The module at the minimum of its loss on some rows, by Newton steps over dense matrices."""
    batch = rows(positions)
    parameters = list(module.net.parameters())
    for _ in range(steps):
        loss = module.training_step(batch, 0)
        gradient = torch.cat([one.flatten() for one in torch.autograd.grad(loss, parameters)])
        if float(gradient.norm()) < 1e-12:
            break
        move = torch.linalg.solve(dense_hessian(module, positions), gradient)
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(parameters) - move, parameters)
    return module


def dense_hessian(module, positions):
    """The Hessian of the module's training loss on some rows, written out."""
    batch = rows(positions)
    parameters = list(module.net.parameters())
    slopes = torch.autograd.grad(module.training_step(batch, 0), parameters, create_graph=True)
    slope = torch.cat([one.flatten() for one in slopes])
    lines = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in slope]
    return torch.stack([torch.cat([one.flatten() for one in line]) for line in lines])


def sample_gradients(module, positions):
    """Gradient of the training loss of each row, (rows, parameters)."""
    parameters = list(module.net.parameters())
    found = []
    for row in positions:
        slopes = torch.autograd.grad(module.training_step(rows([row]), 0), parameters)
        found.append(torch.cat([one.flatten() for one in slopes]))
    return torch.stack(found)
