"""EU-k: retraining where all layers are trained, a plain loop over one layer where one is, and what is restored."""

import copy

import pytest
import torch
from lightning import seed_everything
from torch import nn
from torch.nn import functional

from lightning_unlearn.api import unlearn
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods import ExactUnlearningK, Retrain
from tests.helpers.recorded import EPOCHS, XYClassifier, batches_of, datasets, loaders, record
from tests.modules.cases import same

FORGET = [3, 10, 40]

pytestmark = pytest.mark.filterwarnings("ignore:.*took part in.*:lightning_unlearn.exceptions.UnlearningWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return record(tmp_path_factory.mktemp("euk"), buffers="record")


def forget(model, method, store=None, seed=1):
    settings = {"data": loaders(), "store": store, "trainer": {"max_epochs": EPOCHS, "accelerator": "cpu"}}
    return unlearn(model, FORGET, method=method, seed=seed, probe_samples=0, **settings).model


def test_with_all_layers_it_is_retraining_bit_for_bit(trained):
    twin = forget(trained.model, Retrain(), trained.url).state_dict()
    assert same(twin, forget(trained.model, ExactUnlearningK(k=3), trained.url).state_dict())
    assert not same(twin, forget(trained.model, ExactUnlearningK(k=2), trained.url).state_dict())


def test_one_layer_is_a_plain_loop_from_its_recorded_start(trained):
    module = forget(trained.model, ExactUnlearningK(), trained.url)
    x, y = datasets()[0].tensors
    twin = copy.deepcopy(trained.model)
    body, head = twin.net[:3].eval(), twin.net[3]
    head.load_state_dict({"weight": trained.initial["net.3.weight"], "bias": trained.initial["net.3.bias"]})
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(EPOCHS):
        for rows in batches_of(epoch):
            kept = torch.tensor([row for row in rows.tolist() if row not in FORGET])
            optimizer.zero_grad()
            functional.cross_entropy(head(body(x[kept]).detach()), y[kept]).backward()
            optimizer.step()
    found, wanted = module.state_dict(), twin.state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert same(module.net[:3].state_dict(), trained.model.net[:3].state_dict())


@pytest.mark.parametrize("order", ["same", "fresh"])
def test_frozen_parts_and_flags(trained, order):
    before = trained.model.state_dict()
    module = forget(trained.model, ExactUnlearningK(frozen_statistics="update", order=order), trained.url)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {"net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"}
    assert changed == {"net.3.weight", "net.3.bias"} | statistics
    flags = {name: one.requires_grad for name, one in trained.model.named_parameters()}
    assert {name: one.requires_grad for name, one in module.named_parameters()} == flags
    assert not all(flags.values())
    assert module.net[1].training


def test_without_a_store_layers_are_reset_by_the_seed(trained):
    method = ExactUnlearningK(k=2)
    first, again, other = (forget(trained.model, method, seed=seed).state_dict() for seed in (1, 1, 2))
    assert same(first, again)
    assert not torch.equal(first["net.3.weight"], other["net.3.weight"])
    recorded = forget(trained.model, method, trained.url).state_dict()
    assert not torch.equal(first["net.3.weight"], recorded["net.3.weight"])
    reset = forget(trained.model, ExactUnlearningK(k=2, initial="reset"), trained.url).state_dict()
    assert same(first, reset)
    with pytest.raises(MissingRequirementError, match="weights before training"):
        forget(trained.model, ExactUnlearningK(initial="recorded"))


class Bare(nn.Module):
    """Holds a parameter and has no `reset_parameters`."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * x


def test_what_nobody_can_reset_is_said_before_anything_changes():
    model = XYClassifier()
    model.net.append(Bare())
    before = copy.deepcopy(model.state_dict())
    seed_everything(0, verbose=False)
    for method in (ExactUnlearningK(k=2), ExactUnlearningK(k=9), ExactUnlearningK(layers=["fixed"])):
        with pytest.raises((MissingRequirementError, ValueError), match=r"reset_parameters|`k`|`layers`"):
            forget(model, method)
        assert same(before, model.state_dict())


@pytest.mark.parametrize("settings", [{"initial": "zero"}, {"order": "recorded"}, {"frozen_statistics": "x"}], ids=str)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ExactUnlearningK(**settings)
