"""Noise from an exact diagonal Fisher, against sums over samples and labels and against drawn noise."""

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods import FisherForgetting
from tests.methods.edits import CLASSES, FORGET, Softmax, edit_of, kept, rows, split

PLAIN = {"average_rows": False, "head_factor": 1.0, "vector_factor": 1.0, "cap": 1e9, "head_cap": 1e9}


def fisher(module, positions):
    """Name -> diagonal, with the expectation over labels written out."""
    parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
    total = {name: torch.zeros_like(one) for name, one in parameters.items()}
    for row in positions:
        x, _ = rows([row])
        chances = module(x).detach().softmax(1)[0]
        for label in range(CLASSES):
            loss = functional.cross_entropy(module(x), torch.tensor([label]))
            for (name, _), slope in zip(
                parameters.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True
            ):
                total[name] += chances[label] * slope**2 / len(positions)
    return total


def noise_of(change, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(one.shape, generator=generator).to(one) for name, one in change.items()}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_variance_is_the_inverse_fisher_of_the_retain_data(batch_size):
    module = Softmax(hidden=5)
    change = edit_of(FisherForgetting(alpha=1e-3, seed=4, **PLAIN), module, split(batch_size))
    information, noise = fisher(module, kept()), noise_of(change, 4)
    for name, one in change.items():
        wanted = (1e-3 / (information[name] + 1e-8)).sqrt() * noise[name]
        torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-12)
    elsewhere = fisher(module, FORGET)
    assert not torch.allclose(elsewhere["net.0.weight"], information["net.0.weight"], rtol=1e-2)


def test_caps_rows_and_factors():
    information = torch.tensor([[1.0, 1e-9], [0.5, 0.1]], dtype=torch.float64)
    method = FisherForgetting(alpha=0.1, cap=1e3, head_cap=1e2)
    body = 0.1 * torch.tensor([(1 + 1000) / 2, (2 + 10) / 2], dtype=torch.float64)
    torch.testing.assert_close(method.variance(information, head=False), body[:, None].expand(2, 2), rtol=1e-6, atol=0)
    last = 10 * 0.1 * torch.tensor([(1 + 100) / 2, (2 + 10) / 2], dtype=torch.float64)
    torch.testing.assert_close(method.variance(information, head=True), last[:, None].expand(2, 2), rtol=1e-6, atol=0)
    vector = torch.tensor([1.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(method.variance(vector, head=False), 10 * 0.1 / vector, rtol=1e-6, atol=0)
    # Images: the average is over input channels, and places of a kernel stay apart.
    kernel = torch.rand(3, 2, 2, 2, dtype=torch.float64) + 0.1
    wanted = (0.1 / kernel).mean(1, keepdim=True).expand_as(kernel)
    torch.testing.assert_close(method.variance(kernel, head=False), wanted, rtol=1e-6, atol=0)


def test_a_class_is_drawn_anew_around_zero():
    module = Softmax(hidden=5)
    method = FisherForgetting(alpha=0.0, forget_class=1, class_variance=1e-4, head_factor=10.0, seed=2)
    change = edit_of(method, module)
    noise = noise_of(change, 2)
    for name in ("net.2.weight", "net.2.bias"):
        old, new = dict(module.named_parameters())[name], change[name]
        torch.testing.assert_close(old[1] + new[1], (10 * 1e-4) ** 0.5 * noise[name][1])
        assert not new[[0, 2]].any()
    assert not change["net.0.weight"].any()


def test_the_last_layer_by_rule_and_by_name():
    square = Softmax(hidden=CLASSES)  # a hidden layer with as many rows as classes is taken for the last one
    settings = {"alpha": 1.0, "cap": 1e-3, "head_cap": 1e-5, "head_factor": 1.0, "vector_factor": 1.0, "seed": 0}
    by_rule = edit_of(FisherForgetting(**settings), square)
    by_name = edit_of(FisherForgetting(head=["net.2.*"], **settings), square)
    for name in by_rule:
        factor = 1.0 if name.startswith("net.2") else 10.0
        torch.testing.assert_close(by_name[name], factor * by_rule[name], rtol=1e-5, atol=0)
    with pytest.raises(MissingRequirementError, match="head"):
        edit_of(FisherForgetting(head=["classifier*"]), square)
    with pytest.raises(MissingRequirementError, match="forget_class"):
        edit_of(FisherForgetting(forget_class=CLASSES), square)


def test_seeds_and_draws():
    module = Softmax(hidden=5)
    runs = [edit_of(FisherForgetting(seed=seed), module)["net.0.weight"] for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    passed = edit_of(FisherForgetting(), module, seed=1)["net.0.weight"]
    assert torch.equal(passed, runs[0])
    drawn = edit_of(FisherForgetting(seed=1, alpha=1e-3, max_samples=7, **PLAIN), module)
    order = torch.randperm(len(kept()), generator=torch.Generator().manual_seed(1))[:7].tolist()
    information = fisher(module, [kept()[place] for place in order])
    for name, noise in noise_of(drawn, 1).items():
        torch.testing.assert_close(drawn[name], (1e-3 / (information[name] + 1e-8)).sqrt() * noise, rtol=1e-9, atol=0)


def test_many_labels_and_answers_it_cannot_read():
    class Tags(Softmax):
        def training_step(self, batch, batch_idx):
            return functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    x, y = rows()
    tagged = TensorDataset(x, functional.one_hot(y, CLASSES).double())
    data = UnlearningDataModule(DataLoader(tagged, 8), FORGET)
    module = Tags()
    change = edit_of(FisherForgetting(alpha=1e-3, seed=0, **PLAIN), module, data)
    z = module(x[kept()]).detach().sigmoid()
    information = (z * (1 - z)).mean(0) / CLASSES**2
    wanted = (1e-3 / (information + 1e-8)).sqrt() * noise_of(change, 0)["net.0.bias"]
    torch.testing.assert_close(change["net.0.bias"], wanted, rtol=1e-9, atol=0)

    class Image(Softmax):
        def forward(self, x):
            return super().forward(x)[:, :, None]

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

    with pytest.raises(MissingRequirementError, match=r"shape \(1, C\)"):
        edit_of(FisherForgetting(), Image())


@pytest.mark.parametrize(
    "settings",
    [{"alpha": -1.0}, {"cap": 0.0}, {"head_cap": 0.0}, {"forget_class": -1}, {"max_samples": 0}, {"head": "net.*"}],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        FisherForgetting(**settings)
