"""Which weights are set to zero, against loops over entries; the fine-tuning after it; the paper's linear model."""

import copy
import math

import pytest
import torch
from lightning import LightningModule
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.api import unlearn
from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import MissingRequirementError, UnlearningWarning
from lightning_unlearn.methods import FineTune, PartialUpdates, RetentionMasking
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from tests.helpers.recorded import loaders, record
from tests.methods.passes import FORGET, Answering, assert_close, cross_entropy, plain, run
from tests.modules.cases import dataset, loader, same, trainer, weights


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3)


def scores_by_loop(model, part, importance):
    """Sums of gradient sizes over batches of eight, in eval mode."""
    chosen = [index for index in range(40) if (index in FORGET) == (part == "forget")]
    x, y = dataset().tensors
    module = copy.deepcopy(model).eval()
    sums = {name: torch.zeros_like(one) for name, one in module.named_parameters()}
    for rows in torch.tensor(chosen).split(8):
        module.zero_grad()
        functional.cross_entropy(module.net(x[rows]), y[rows]).backward()
        for name, one in module.named_parameters():
            sums[name] += one.grad.abs() if importance == "absolute" else one.grad**2
    return sums


def zeroed_by_loop(model, keep, mask_of, importance):
    """Name -> positions that are set to zero."""
    found = {}
    for name, scores in scores_by_loop(model, mask_of, importance).items():
        values = scores.flatten().tolist()
        if scores.ndim < 2:
            continue
        order = sorted(range(len(values)), key=lambda place, values=values: -values[place])
        kept = math.ceil(keep * len(values))
        found[name] = set(order[kept:] if mask_of == "retain" else order[: len(values) - kept])
    return found


@pytest.mark.parametrize("importance", ["absolute", "squared"])
@pytest.mark.parametrize("mask_of", ["retain", "forget"])
def test_what_is_set_to_zero(mask_of, importance):
    model = Answering()
    method = RetentionMasking(keep=0.7, mask_of=mask_of, importance=importance, max_steps=1)
    _, seen = run(method, model)
    wanted = zeroed_by_loop(model, 0.7, mask_of, importance)
    assert len(wanted) == 2
    for name, start in model.named_parameters():
        masked = seen.weights[0][name].flatten()
        zeroed = set(torch.nonzero(masked != start.flatten()).flatten().tolist())
        assert zeroed == wanted.get(name, set()), name
        assert not zeroed or bool((masked[list(zeroed)] == 0).all())


def test_one_threshold_for_all_and_vectors_as_well():
    model = Answering()
    _, seen = run(RetentionMasking(keep=0.5, scope="global", vectors=True, max_steps=1), model)
    sums = scores_by_loop(model, "retain", "absolute")
    flat = torch.cat([sums[name].flatten() for name in sums])
    threshold = flat.sort(descending=True).values[math.ceil(0.5 * len(flat)) - 1]
    for name, start in model.named_parameters():
        wanted = torch.where(sums[name] >= threshold, start, torch.zeros_like(start))
        assert torch.equal(seen.weights[0][name], wanted), name


def test_then_it_is_fine_tuning():
    model = Answering()
    module, seen = run(RetentionMasking(keep=0.6, max_steps=7), model)
    masked = copy.deepcopy(model)
    masked.load_state_dict({**model.state_dict(), **seen.weights[0]})
    assert not same(weights(masked), weights(model))
    twin = plain(masked, seen.batches, lambda one, batch, _: cross_entropy(one, batch["retain"]), model.hparams.lr / 3)
    assert_close(module, twin)


def test_keeping_everything_is_fine_tuning_bit_for_bit():
    model = Answering(dropout=0.3)
    tuned, _ = run(FineTune(max_steps=6), model)
    kept, _ = run(RetentionMasking(keep=1.0, max_steps=6), model)
    assert same(weights(tuned), weights(kept))


@pytest.mark.parametrize("updates", [None, PartialUpdates(0.5, "random")])
def test_restricted_updates_leave_zeros_alone(updates):
    settings = {"keep": 0.6, "max_steps": 5, "optimizer": adamw}
    method = RetentionMasking(restrict=True, **settings).with_updates(updates)
    module, seen = run(method)
    free, _ = run(RetentionMasking(**settings))
    for name, one in module.named_parameters():
        start = seen.weights[0][name]
        if one.ndim > 1:
            assert int((start == 0).sum()) == one.numel() - math.ceil(0.6 * one.numel())
            assert bool((one[start == 0] == 0).all())
            assert bool((dict(free.named_parameters())[name][start == 0] != 0).any())
        assert bool((one != start).any())
        for before, after in zip(seen.weights[:-1], seen.weights[1:], strict=True):
            moved = int((before[name] != after[name]).sum())
            assert moved <= (one.numel() if updates is None else math.ceil(0.5 * one.numel()))
    assert method._masks == {}


class Linear(LightningModule):
    """The paper's overparameterised regression, in float64."""

    def __init__(self, start):
        super().__init__()
        self.w = torch.nn.Parameter(start.clone()[None])

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(batch[0] @ self.w[0], batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_in_the_papers_linear_model_with_distinct_features_it_is_the_retrained_one():
    generator = torch.Generator().manual_seed(0)
    n_retain, n_forget, d_retain, d_forget = 20, 10, 30, 25
    x = torch.zeros(n_retain + n_forget, d_retain + d_forget, dtype=torch.float64)
    x[:n_retain, :d_retain] = torch.randn(n_retain, d_retain, generator=generator, dtype=torch.float64)
    x[n_retain:, d_retain:] = torch.randn(n_forget, d_forget, generator=generator, dtype=torch.float64)
    truth = torch.randn(d_retain + d_forget, generator=generator, dtype=torch.float64)
    y = x @ truth
    original, golden = torch.linalg.pinv(x) @ y, torch.linalg.pinv(x[:n_retain]) @ y[:n_retain]
    # The trained model fits almost perfectly: at exact fit the gradients would be rounding errors.
    start = original + 1e-9 * torch.randn(original.shape, generator=generator, dtype=torch.float64)
    data = UnlearningDataModule(DataLoader(TensorDataset(x, y), 5), range(n_retain, n_retain + n_forget))
    settings = {"data": data, "precision": "64-true"}
    masked, _ = run(RetentionMasking(keep=d_retain / (d_retain + d_forget), max_epochs=5), Linear(start), **settings)
    tuned, _ = run(FineTune(max_epochs=5), Linear(start), **settings)

    def losses(w):
        squares = (x @ w.detach() - y).square()
        return squares[:n_retain].mean().item(), squares[n_retain:].mean().item()

    of_golden = losses(golden)
    # The closed form of the paper's theorem: what the truth says of features that were never seen.
    assert of_golden[1] == pytest.approx((x[n_retain:, d_retain:] @ truth[d_retain:]).square().mean().item())
    assert losses(masked.w[0]) == pytest.approx(of_golden, abs=1e-6)
    assert losses(tuned.w[0]) == pytest.approx((0.0, 0.0), abs=1e-6)
    torch.testing.assert_close(masked.w[0].detach(), golden, rtol=0, atol=1e-6)


def test_a_pass_with_a_store_is_not_recorded_and_says_so(tmp_path):
    trained = record(tmp_path)
    steps = trained.store.n_steps
    with pytest.warns(UnlearningWarning, match="RetentionMasking changes weights outside its optimizer steps"):
        result = unlearn(
            trained.model,
            [3],
            method=RetentionMasking(max_steps=3),
            data=loaders(),
            store=trained.url,
            trainer={"accelerator": "cpu"},
            probe_samples=0,
        )
    assert trained.store.n_steps == steps
    assert any("outside its optimizer steps" in note for note in result.notes)


class Silent(Answering):
    """Skips every batch outside training."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if self.training else None


class VectorsOnly(LightningModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(5))

    def training_step(self, batch, batch_idx):
        return (batch[0] @ self.w).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("model", "match"), [(Silent(), "returning a loss in eval mode"), (VectorsOnly(), "vectors=True")]
)
def test_without_anything_to_go_by_nothing_is_changed(model, match):
    before = weights(model)
    method = RetentionMasking(max_steps=1)
    wrapped = UnlearningModule(model, method)
    data = UnlearningDataModule(loader(), FORGET).with_parts(method.parts)
    with pytest.raises(MissingRequirementError, match=match):
        trainer(max_steps=1).fit(wrapped, datamodule=data)
    wrapped.unwrap()
    assert same(before, weights(model))


@pytest.mark.parametrize(
    "settings", [{"keep": 0.0}, {"mask_of": "test"}, {"importance": "signed"}, {"scope": "model"}], ids=str
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RetentionMasking(**settings)


def two_processes():
    model = Answering()
    method = RetentionMasking(keep=0.6, restrict=True, max_steps=3)
    wrapped = UnlearningModule(model, method)
    data = UnlearningDataModule(loader(), FORGET, seed=5).with_parts(method.parts)
    trainer(max_steps=3, strategy="ddp", devices=2).fit(wrapped, datamodule=data)
    wrapped.unwrap()
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def test_processes_agree_on_the_mask(gloo_pool):
    first, second = gloo_pool.run(two_processes)
    wanted = zeroed_by_loop(Answering(), 0.6, "retain", "absolute")
    for name, one in first.items():
        assert torch.equal(one, second[name])
        if name in wanted:
            assert wanted[name] == set(torch.nonzero(one.flatten() == 0).flatten().tolist()), name
