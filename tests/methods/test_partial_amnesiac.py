"""Pruning once on the sum: against a dense float64 sum that is sorted, and through ledger, undo and later requests."""

import math
from fnmatch import fnmatchcase

import pytest
import torch

from lightning_unlearn.api import unlearn
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods import Amnesiac, PartialAmnesiac, Requirement
from tests.helpers.recorded import loaders, record
from tests.modules.cases import same, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*took part in.*:lightning_unlearn.exceptions.UnlearningWarning")

IDS = [5, 23]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recorded training whose ledger stays empty: `record=False` in every pass."""
    return record(tmp_path_factory.mktemp("partial"))


def forget(trained, ids, method, model=None, **settings):
    settings = {"record": False, "batch_norm": "keep", "force": True, "probe_samples": 0, **settings}
    return unlearn(
        trained.model if model is None else model, ids, method=method, data=loaders(), store=trained.url, **settings
    )


def dense_sum(store, steps, scale="step"):
    """The sum of the deltas of some steps, in float64, densely."""
    totals = {layer.name: torch.zeros(layer.shape, dtype=torch.float64) for layer in store.signature.layers}
    for step in steps:
        held = store.record(step)
        amount = sum(one in IDS for one in held.sample_ids) / held.batch_size if scale == "share" else 1.0
        for name, delta in store.read(step).items():
            flat = torch.zeros(totals[name].numel(), dtype=torch.float64)
            flat[slice(None) if delta.indices is None else delta.indices] = delta.values.double()
            totals[name] += amount * flat.view(totals[name].shape)
    return totals


def top(total, fraction):
    """The largest entries of a tensor, by sorting all of them."""
    flat = total.flatten().tolist()
    chosen = sorted(range(len(flat)), key=lambda place: (-abs(flat[place]), place))[: math.ceil(fraction * len(flat))]
    kept = torch.zeros(len(flat), dtype=torch.float64)
    kept[chosen] = total.flatten()[chosen]
    return kept.view(total.shape)


@pytest.mark.parametrize("scale", ["step", "share"])
@pytest.mark.parametrize("keep", [0.25, {"net.0.*": 0.5, "*.weight": 0.1}], ids=str)
def test_the_largest_entries_of_the_whole_sum(trained, scale, keep):
    method = PartialAmnesiac(keep=keep, prune="sum", scale=scale)
    result = forget(trained, IDS, method)
    totals = dense_sum(trained.store, trained.store.steps_of(IDS).tolist(), scale)
    after, changed = dict(result.model.named_parameters()), 0
    for name, before in trained.model.named_parameters():
        if not before.requires_grad:
            assert torch.equal(after[name], before)
            continue
        fraction = keep
        if not isinstance(keep, float):
            fraction = next((value for pattern, value in keep.items() if fnmatchcase(name, pattern)), 1.0)
        wanted = top(totals[name], fraction)
        changed += int((wanted != 0).sum())
        assert torch.equal(after[name].detach(), (before.detach().double() - wanted).float()), name
    assert result.plan.changed_weights == changed
    assert not same(weights(result.model), weights(forget(trained, IDS, PartialAmnesiac(keep=keep, scale=scale)).model))


@pytest.mark.parametrize("keep", [None, 1.0, {"*": 1.0}], ids=str)
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("prune", ["step", "sum"])
def test_everything_kept_is_amnesiac_bit_for_bit(trained, keep, criterion, prune):
    wanted = forget(trained, IDS, Amnesiac()).model
    found = forget(trained, IDS, PartialAmnesiac(keep=keep, prune=prune, criterion=criterion)).model
    assert same(weights(wanted), weights(found))
    assert not same(weights(found), weights(trained.model))


@pytest.mark.parametrize("prune", ["step", "sum"])
def test_random_entries_come_again_with_their_seed(trained, prune):
    def found(mask_seed, **settings):
        method = PartialAmnesiac(keep=0.25, prune=prune, criterion="random", mask_seed=mask_seed)
        return weights(forget(trained, IDS, method, **settings).model)

    first = found(3, seed=1)
    assert same(first, found(3, seed=2))
    assert not same(first, found(4, seed=1))
    assert not same(first, weights(forget(trained, IDS, PartialAmnesiac(keep=0.25, prune=prune)).model))
    if prune == "sum":
        totals = dense_sum(trained.store, trained.store.steps_of(IDS).tolist())
        for name, before in trained.model.named_parameters():
            moved = first[name] != before
            assert int(moved.sum()) <= math.ceil(0.25 * before.numel())
            whole = (before.detach().double() - totals[name]).float() if before.requires_grad else before
            assert torch.equal(first[name][moved], whole[moved]), name


def test_a_pruned_store_is_refused_before_anything(tmp_path):
    pruned = record(tmp_path, keep=0.5)
    before = weights(pruned.model)
    method = PartialAmnesiac(keep=0.1, prune="sum")
    with pytest.raises(MissingRequirementError, match=r"PartialAmnesiac needs .*keep=1\.0.*with prune=\"step\""):
        forget(pruned, IDS, method, record=True)
    with pytest.raises(MissingRequirementError, match=r"keep=1\.0 to prune the sum.*prune=\"step\""):
        DeletionRequest(IDS).plan(pruned.store, pruned.model, keep=method.keep)
    assert method.missing({Requirement.DELTAS}) == [Requirement.DENSE_DELTAS]
    assert PartialAmnesiac(keep=0.1).missing({Requirement.DELTAS}) == []
    assert same(before, weights(pruned.model))
    assert pruned.store.lineage.entries == ()


@pytest.mark.parametrize(
    "method",
    [
        PartialAmnesiac(keep=0.25, prune="sum"),
        PartialAmnesiac(keep=0.25, prune="sum", criterion="random", mask_seed=2),
        PartialAmnesiac(keep={"*.weight": 0.25}, criterion="random"),
    ],
    ids=repr,
)
def test_the_ledger_takes_the_pruned_sum_back(tmp_path, method):
    trained = record(tmp_path)
    first = forget(trained, IDS, method, record=True)
    (entry,) = trained.store.lineage.entries
    assert entry.keep == method.keep
    start, after = weights(trained.model), weights(first.model)
    largest = max(float(one.abs().max()) for one in start.values())
    assert max(float((after[name] - start[name]).abs().max()) for name in start) > 1e-3 * largest
    DeletionLedger.open(trained.store).undo(entry.entry_id, first.model)
    undone = weights(first.model)
    assert max(float((undone[name] - start[name]).abs().max()) for name in start) <= 3 * 2.0**-24 * largest


def test_a_second_request_prunes_what_is_left_of_its_own_steps(tmp_path):
    trained = record(tmp_path)
    method = PartialAmnesiac(keep=0.25, prune="sum")
    first = forget(trained, [5], method, record=True)
    second = forget(trained, [23], method, model=first.model, record=True)
    left = set(trained.store.steps_of([23]).tolist()) - set(trained.store.steps_of([5]).tolist())
    assert set(second.plan.amounts) == left
    totals = dense_sum(trained.store, sorted(left))
    for (name, before), (_, after) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        if before.requires_grad:
            wanted = (before.detach().double() - top(totals[name], 0.25)).float()
            assert torch.equal(after.detach(), wanted), name


def test_with_everything_kept_two_requests_equal_their_union(tmp_path):
    trained = record(tmp_path)
    method = PartialAmnesiac(keep=1.0, prune="sum")
    union = weights(forget(trained, IDS, method).model)
    first = forget(trained, IDS[:1], method, record=True)
    both = weights(forget(trained, IDS[1:], method, model=first.model, record=True).model)
    largest = max(float(one.abs().max()) for one in union.values())
    assert max(float((both[name] - union[name]).abs().max()) for name in union) <= 3 * 2.0**-24 * largest


@pytest.mark.parametrize("wrong", [{"prune": "never"}, {"criterion": "largest"}, {"mask_seed": -1}, {"keep": 0.0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PartialAmnesiac(**wrong)
