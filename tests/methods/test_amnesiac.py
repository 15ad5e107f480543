"""Amnesiac subtraction against an independent re-statement of Graves' rule, and the algebra of requests."""

import copy

import pytest
import torch

from lightning_unlearn.api import unlearn
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods import Amnesiac, PartialAmnesiac
from tests.helpers.recorded import EPOCHS, XYClassifier, batches_of, datasets, loaders, record

# Sixty-four rows in twenty-four steps: every plan has something to warn of, which is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*took part in.*:lightning_unlearn.exceptions.UnlearningWarning")


def graves(ids, seed=0):
    """Graves et al. in a plain loop: train, add up the changes of the batches that held an id, subtract the sum."""
    torch.manual_seed(seed)
    model = XYClassifier()
    optimizer = model.configure_optimizers()
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.named_parameters()}
    train, _ = datasets(seed)
    for epoch in range(EPOCHS):
        for batch in batches_of(epoch):
            x, y = train[batch]
            before = {name: value.detach().clone() for name, value in model.named_parameters()}
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if set(ids) & set(batch.tolist()):
                for name, value in model.named_parameters():
                    total[name] += value.detach().double() - before[name].double()
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(value.double() - total[name])
    return trained, model


def largest(model):
    return max(float(p.detach().abs().max()) for p in model.parameters())


def distance(one, other):
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for (_, a), (_, b) in pairs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return record(tmp_path_factory.mktemp("amnesiac"))


def forget(trained, ids, method, model=None, **settings):
    return unlearn(
        trained.model if model is None else model, ids, method=method, data=loaders(), store=trained.url,
        batch_norm="keep", force=True, probe_samples=0, **settings,
    )  # fmt: skip


def test_equals_graves_rule(tmp_path):
    trained = record(tmp_path)
    ids = [3, 17, 40]
    original, expected = graves(ids)
    assert distance(trained.model, original) == 0.0, "the oracle must repeat the training bit for bit"
    unlearned = forget(trained, ids, Amnesiac()).model
    assert distance(expected, original) > 1e-3
    assert distance(unlearned, expected) <= 1e-7 * largest(original)


def test_forgetting_everything_returns_to_the_start(trained):
    unlearned = forget(trained, list(range(64)), Amnesiac()).model
    start = trained.initial
    gap = max(float((value - start[name]).detach().abs().max()) for name, value in unlearned.named_parameters())
    assert gap <= 1e-7 * largest(trained.model)


@pytest.mark.parametrize("scale", ["step", "share"])
@pytest.mark.parametrize("partial", [False, True])
def test_two_requests_equal_their_union(tmp_path, scale, partial):
    trained = record(tmp_path)
    method = PartialAmnesiac(keep=0.3, scale=scale) if partial else Amnesiac(scale=scale)
    union = forget(trained, [1, 2, 3, 4], method).model
    first = forget(trained, [1, 2], method)
    second = forget(trained, [3, 4], method, model=first.model)
    assert second.plan.touched_fraction > 0
    assert distance(second.model, trained.model) > 1e-3
    assert distance(second.model, union) <= 2e-7 * largest(trained.model)


def test_share_subtracts_the_forgotten_part_of_each_batch(trained):
    whole = forget(trained, [5], Amnesiac()).model
    share = forget(trained, [5], Amnesiac(scale="share")).model
    for (name, w), (_, s), (_, o) in zip(
        whole.named_parameters(), share.named_parameters(), trained.model.named_parameters(), strict=True
    ):
        # Every batch holds 8 samples, so one sample's share is an eighth.
        assert torch.allclose((s - o) * 8, w - o, atol=2e-6), name


def test_partial_with_everything_kept_is_amnesiac(trained):
    assert distance(forget(trained, [5], Amnesiac()).model, forget(trained, [5], PartialAmnesiac(keep=1.0)).model) == 0


def test_partial_subtracts_the_largest_entries_of_each_step(tmp_path):
    trained = record(tmp_path)
    store = trained.store
    ids, keep = [5], 0.25
    expected = {name: value.detach().double() for name, value in trained.model.named_parameters()}
    numbers = {index: layer.name for index, layer in enumerate(store.signature.layers)}
    for step in store.steps_of(ids).tolist():
        for delta in store.read(step).values():
            name = numbers[delta.layer]
            flat = torch.zeros(expected[name].numel(), dtype=torch.float64)
            dense = (
                delta.values.double()
                if delta.indices is None
                else flat.scatter(0, delta.indices, delta.values.double())
            )
            count = -(-len(dense) * 25 // 100)
            chosen = sorted(range(len(dense)), key=lambda i: (-abs(float(dense[i])), i))[:count]
            flat[chosen] = dense[chosen]
            expected[name] = expected[name] - flat.view_as(expected[name])
    unlearned = forget(trained, ids, PartialAmnesiac(keep=keep)).model
    for name, value in unlearned.named_parameters():
        assert torch.allclose(value.double(), expected[name], atol=1e-7), name


def test_amnesiac_refuses_a_pruned_store(tmp_path):
    pruned = record(tmp_path, keep=0.5)
    with pytest.raises(MissingRequirementError, match=r"keep=1\.0"):
        forget(pruned, [5], Amnesiac())
    with pytest.raises(ValueError, match=r"at most 0\.5"):
        forget(pruned, [5], PartialAmnesiac(keep=0.7))
    assert distance(forget(pruned, [5], PartialAmnesiac()).model, pruned.model) > 0


@pytest.mark.parametrize("keep", [0, 1.5, -0.1, True, {"*": 2.0}])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match=r"fraction in \(0, 1\]"):
        PartialAmnesiac(keep=keep)
