"""A pass of two processes is that of one process with the same global batches: no BatchNorm, every sample once."""

import inspect
import warnings

import pytest
import torch
from lightning import LightningModule, seed_everything
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.api import unlearn
from lightning_unlearn.methods import METHODS, LossMethod, Requirement, WeightEdit

ROWS, CLASSES, FORGET = 24, 3, [0, 3, 5, 8, 13, 21]
EVEN = 2  # a class with an even number of rows, so that halves are whole
# Its mask comes from the gradients of single batches, which are others where batches are.
BY_BATCH = {"RetentionMasking"}


class Smooth(LightningModule):
    """Without BatchNorm, and without a kink at which roundings would matter."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def dataset(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.rand(ROWS, 5, generator=generator), torch.randint(0, CLASSES, (ROWS,), generator=generator)
    )


def watched(batch_size, processes, strategy="ddp", model=None):
    """Weights and notes after a pass that is stopped by what held-out data say."""
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    model = Smooth() if model is None else model()
    trainer = {"accelerator": "cpu", "devices": processes} | ({"strategy": strategy} if processes > 1 else {})
    result = unlearn(
        model,
        FORGET,
        method=METHODS["NegGradPlus"](max_steps=300, stop="retain", retain_weight=0.2),
        data={"train": DataLoader(dataset(), batch_size, shuffle=True), "val": DataLoader(dataset(seed=1), 7)},
        trainer=trainer,
        probe_samples=0,
        seed=3,
        force=True,
    )
    weights = torch.cat([one.detach().double().flatten() for one in result.model.parameters()])
    return weights.tolist(), result.stages[0].steps, result.notes


def edit(name):
    """Weights after an edit."""
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    model = Smooth()
    data = DataLoader(dataset(), 5, shuffle=True)
    result = unlearn(model, FORGET, method=METHODS[name](), data=data, probe_samples=0, seed=3, force=True)
    assert result.stages[0].relative_change > 0
    return torch.cat([one.detach().double().flatten() for one in result.model.parameters()]).tolist()


def forget(name, batch_size, processes, strategy="ddp", model=None):
    """Weights after a pass in which every batch is the whole of its part."""
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    model = Smooth() if model is None else model()
    known = inspect.signature(METHODS[name]).parameters
    settings = {"stop": None} if "stop" in known else {}
    settings |= {"max_steps": 4} if "max_steps" in known else {}
    # Labels drawn anew for every batch are others on every process, and in every run.
    settings |= {"draw": "sample"} if "draw" in known else {}
    # The model is untrained and seeded with 0: a teacher drawn with the same seed would be the same network.
    settings |= {"seed": 7} if "seed" in known else {}
    trainer = {"accelerator": "cpu"} | (
        {"strategy": strategy, "devices": processes} if processes > 1 else {"devices": 1}
    )
    by_class = torch.nonzero(dataset().tensors[1] == EVEN).flatten().tolist()
    result = unlearn(
        model,
        by_class if METHODS[name].forgets == "classes" else FORGET,
        method=METHODS[name](**settings),
        data=DataLoader(dataset(), batch_size, shuffle=True),
        trainer=trainer,
        probe_samples=0,
        seed=3,
        force=True,
    )
    start = dict(model.named_parameters())
    changes = {key: (one - start[key]).detach().double() for key, one in result.model.named_parameters()}
    return torch.cat([one.flatten() for one in changes.values()]).tolist()


def names():
    """Every method that trains in a Trainer on data alone."""
    for name, cls in sorted(METHODS.items()):
        needs = cls.requires - {Requirement.FORGET_DATA, Requirement.RETAIN_DATA}
        if issubclass(cls, LossMethod) and not needs and name not in BY_BATCH:
            yield pytest.param(name, marks=[] if name == "NegGradPlus" else pytest.mark.slow)


@pytest.mark.parametrize("name", list(names()))
def test_the_change_is_that_of_one_process(gloo_pool, name):
    alone = torch.tensor(forget(name, ROWS, 1))
    shared = [torch.tensor(one) for one in gloo_pool.run(forget, name, ROWS // 2, 2)]
    assert torch.equal(shared[0], shared[1])
    assert float(alone.norm()) > 0
    assert float((shared[0] - alone).norm()) <= 1e-5 * float(alone.norm())


def test_a_pass_is_stopped_where_one_process_stops_it(gloo_pool):
    alone, steps, notes = watched(ROWS, 1)
    (first, *others), (second, *same) = gloo_pool.run(watched, ROWS // 2, 2)
    assert 1 < steps < 300
    assert any("taken back" in note for note in notes)
    assert first == second
    assert others == same == [steps, notes]
    assert torch.allclose(torch.tensor(first), torch.tensor(alone), rtol=1e-4, atol=1e-6)


def edits():
    """Every edit that needs data alone; each process computes it from all of them."""
    for name, cls in sorted(METHODS.items()):
        if issubclass(cls, WeightEdit) and cls.requires <= {Requirement.FORGET_DATA, Requirement.RETAIN_DATA}:
            yield pytest.param(name, marks=[] if name == "SelectiveSynapticDampening" else pytest.mark.slow)


@pytest.mark.parametrize("name", list(edits()))
def test_an_edit_is_the_same_on_every_process(gloo_pool, name):
    alone = edit(name)
    assert gloo_pool.run(edit, name) == [alone, alone]


class Normed(Smooth):
    """With BatchNorm, whose statistics are those of each process' own batches."""

    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(8))


def normed():
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    trainer = {"accelerator": "cpu", "strategy": "ddp", "devices": 2}
    data = DataLoader(dataset(), 5, shuffle=True)
    result = unlearn(Normed(), [0, 3, 5], method=METHODS["FineTune"](max_steps=3), data=data, trainer=trainer, seed=3)
    state = {name: value.tolist() for name, value in result.model.state_dict().items()}
    return state, dict(result.stages[0].probe_after), result.rolled_back


def test_statistics_and_verdict_are_the_same_on_every_process(gloo_pool):
    zero, one = gloo_pool.run(normed)
    assert zero == one
