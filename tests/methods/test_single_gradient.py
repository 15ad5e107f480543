"""The first-order step: exact where the loss is linear, and by hand at recorded weights elsewhere."""

import copy
import warnings

import pytest
import torch
from lightning import LightningModule, seed_everything
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.api import unlearn
from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.exceptions import MissingRequirementError, UnlearningWarning
from lightning_unlearn.methods import SingleGradient
from tests.helpers.models import quiet_trainer
from tests.helpers.recorded import BATCH, EPOCHS, XYClassifier, batches_of, datasets, loaders, record
from tests.methods.edits import FORGET, Softmax, edit_of, flat, rows, split

LR = 0.05


class Linear(LightningModule):
    """Its loss is linear in the weights, so no gradient depends on them."""

    def __init__(self, optimizer=torch.optim.SGD):
        super().__init__()
        self.w = nn.Parameter(torch.arange(4, dtype=torch.float64))
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (x @ self.w * y).mean()

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.1)


def linear_data(n=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randn(n, generator=generator, dtype=torch.float64))


def recorded_linear(folder, optimizer=torch.optim.SGD, n=24):
    model, url = Linear(optimizer), str(folder / "store")
    loader = DataLoader(linear_data(n), 8, shuffle=True, generator=torch.Generator().manual_seed(2))
    quiet_trainer(max_epochs=3, callbacks=[DeltaRecorder(url, keep=0.5)]).fit(model, loader)
    return model, url


def forget(model, ids, method, data, **settings):
    settings = {"probe_samples": 0, "batch_norm": "keep", **settings}
    return unlearn(model, ids, method=method, data=data, **settings).model


@pytest.mark.parametrize(("n", "forgotten"), [(24, [3, 7, 21]), (22, [5])], ids=["full batches", "one sample"])
def test_a_linear_loss_is_unlearned_exactly(tmp_path, n, forgotten):
    model, url = recorded_linear(tmp_path, n=n)
    x, y = linear_data(n).tensors
    # The same training with the terms of these samples left out of every mean.
    twin = torch.arange(4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    loader = DataLoader(TensorDataset(torch.arange(n)), 8, shuffle=True, generator=generator)
    sizes = []
    for _ in range(3):
        for (positions,) in loader:
            keep = [row for row in positions.tolist() if row not in forgotten]
            twin -= 0.1 * (x[keep] * y[keep, None]).sum(0) / len(positions)
            sizes += [len(positions)] * (len(keep) < len(positions))
    assert set(sizes) == ({8} if n == 24 else {6, 8})
    found = forget(model, forgotten, SingleGradient(max_relative_norm=None), DataLoader(linear_data(n), 8), store=url)
    assert float((model.w.detach() - twin).norm()) > 0.01
    torch.testing.assert_close(found.w.detach(), twin, rtol=1e-12, atol=1e-13)


def test_given_numbers_and_weights_need_no_store():
    module, before = Softmax(hidden=3), Softmax(hidden=3)
    with torch.no_grad():
        for one in before.net.parameters():
            one.mul_(0.5).add_(0.1)
    initial = {name: one.detach().clone() for name, one in before.named_parameters()}
    method = SingleGradient(lr=0.2, epochs=3, batch_size=8, initial_weights=initial, max_relative_norm=None)
    change = edit_of(method, module, split(2))
    loss = functional.cross_entropy(before(rows(FORGET)[0]), rows(FORGET)[1], reduction="sum")
    wanted = torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(before.net.parameters()))])
    torch.testing.assert_close(flat(change), 0.2 * 3 / 8 * wanted, rtol=1e-10, atol=1e-12)
    assert list(change) == [name for name, one in module.named_parameters() if one.requires_grad]


def by_hand(weights, ids, *, train):
    """Sum of the gradients of the recorded model's loss on some rows, at other weights, by name."""
    module = XYClassifier()
    module.load_state_dict({**module.state_dict(), **weights}, strict=True)
    module.train(train)
    x, y = datasets()[0].tensors
    loss = functional.cross_entropy(module(x[ids]), y[ids], reduction="sum")
    names = [name for name, one in module.named_parameters() if one.requires_grad]
    parameters = [dict(module.named_parameters())[name] for name in names]
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def uses(ids):
    """Of every epoch how often the ids were used, each time one of a full batch."""
    return [sum(int(one in batch) for batch in batches_of(epoch) for one in ids) for epoch in range(EPOCHS)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return record(tmp_path_factory.mktemp("anchored"), keep=0.1, anchor_every=64 // BATCH)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_numbers_and_weights_come_from_the_store(trained, statistics):
    ids = [2, 3, 40]
    assert uses(ids) == [3, 3, 3]
    method = SingleGradient(max_relative_norm=None, statistics=statistics)
    new = forget(trained.model, ids, method, loaders(), store=trained.url)
    wanted = by_hand(trained.initial, ids, train=statistics == "batch")
    for name, old in trained.model.named_parameters():
        if old.requires_grad:
            change = dict(new.named_parameters())[name] - old
            torch.testing.assert_close(change, LR * EPOCHS / BATCH * wanted[name], rtol=1e-3, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(new.buffers(), trained.model.buffers(), strict=True))


def test_what_is_given_replaces_what_is_recorded(trained):
    ids = [2, 3, 40]
    base = SingleGradient(max_relative_norm=None, statistics="running")
    start = torch.nn.utils.parameters_to_vector(trained.model.parameters())

    def change(**settings):
        method = copy.copy(base)
        vars(method).update(settings)
        new = forget(trained.model, ids, method, loaders(), store=trained.url)
        return torch.nn.utils.parameters_to_vector(new.parameters()) - start

    plain = change()
    for settings, factor in (({"lr": 2 * LR}, 2.0), ({"epochs": 1}, 1 / EPOCHS), ({"batch_size": 2 * BATCH}, 0.5)):
        torch.testing.assert_close(change(**settings), factor * plain, rtol=1e-3, atol=1e-6)


def test_per_epoch_takes_gradients_at_recorded_anchors(trained):
    ids = [2, 3, 40]
    store = trained.store
    assert store.anchors == [8, 16, 24]
    method = SingleGradient(anchor="per_epoch", max_relative_norm=None)
    new = forget(trained.model, ids, method, loaders(), store=trained.url)
    at = [trained.initial, *({**trained.initial, **store.read_anchor(step).weights} for step in (8, 16))]
    found = [by_hand(weights, ids, train=True) for weights in at]
    for name, old in trained.model.named_parameters():
        if old.requires_grad:
            change = dict(new.named_parameters())[name] - old
            wanted = LR / BATCH * sum(one[name] for one in found)
            torch.testing.assert_close(change, wanted, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(found[0]["net.0.weight"], found[2]["net.0.weight"], rtol=0.1)


def test_a_step_that_is_too_long_is_shortened_and_said(trained):
    ids = list(range(40))
    start, old = trained.initial, dict(trained.model.named_parameters())
    trainable = [name for name, one in old.items() if one.requires_grad]
    travel = sum(float((old[name].detach() - start[name]).double().square().sum()) for name in trainable) ** 0.5
    with pytest.warns(UnlearningWarning, match=r"shortened to 0.05 .* times as long"):
        new = forget(trained.model, ids, SingleGradient(), loaders(), store=trained.url)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = forget(trained.model, ids, SingleGradient(max_relative_norm=None), loaders(), store=trained.url)
    short, long = (
        torch.cat([(dict(one.named_parameters())[name] - old[name]).detach().double().flatten() for name in trainable])
        for one in (new, whole)
    )
    assert float(short.norm()) == pytest.approx(0.05 * travel, rel=1e-4)
    assert float(long.norm()) > float(short.norm())
    assert float(functional.cosine_similarity(short, long, dim=0)) == pytest.approx(1.0, abs=1e-5)


def test_one_sample_has_no_statistics(trained):
    new = forget(trained.model, [5], SingleGradient(max_relative_norm=None), loaders(), store=trained.url)
    wanted = by_hand(trained.initial, [5], train=False)["net.0.weight"]
    change = new.net[0].weight - trained.model.net[0].weight
    torch.testing.assert_close(change, LR * EPOCHS / BATCH * wanted, rtol=1e-3, atol=1e-6)


def test_what_is_missing_is_said(trained, tmp_path):
    with pytest.raises(MissingRequirementError, match="weights before training"):
        forget(trained.model, [5], SingleGradient(lr=0.1, epochs=1, batch_size=8), loaders())
    initial = trained.initial
    with pytest.raises(MissingRequirementError, match="lr, epochs"):
        forget(trained.model, [5], SingleGradient(batch_size=8, initial_weights=initial), loaders())
    given = {"lr": 0.1, "epochs": 1, "batch_size": 8}
    method = SingleGradient(anchor="per_epoch", initial_weights=initial, **given)
    with pytest.raises(MissingRequirementError, match="knows these weights"):
        forget(trained.model, [5], method, loaders())
    method = SingleGradient(initial_weights={"net.0.bias": initial["net.0.bias"]}, **given)
    with pytest.raises(MissingRequirementError, match="every trainable parameter"):
        forget(trained.model, [5], method, loaders())
    sparse = record(tmp_path / "sparse", keep=0.1)
    with pytest.raises(MissingRequirementError, match="anchor_every"):
        forget(sparse.model, [5], SingleGradient(anchor="per_epoch"), loaders(), store=sparse.url)
    seed_everything(0, verbose=False)
    (tmp_path / "adam").mkdir()
    model, url = recorded_linear(tmp_path / "adam", torch.optim.Adam)
    with pytest.raises(MissingRequirementError, match=r"lr.*SGD.*Adam"):
        forget(model, [3], SingleGradient(), DataLoader(linear_data(), 8), store=url)
    moved = forget(model, [3], SingleGradient(lr=0.1, max_relative_norm=None), DataLoader(linear_data(), 8), store=url)
    assert not torch.equal(moved.w, model.w)


@pytest.mark.parametrize(
    "settings",
    [{"anchor": "last"}, {"lr": 0}, {"epochs": -1}, {"batch_size": 0}, {"max_relative_norm": 0}, {"statistics": "own"}],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SingleGradient(**settings)
