import dataclasses
import math
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch

from lightning_unlearn.deltas.accumulate import accumulate, subtract_from, sum_size
from lightning_unlearn.deltas.layer_sums import layer_sums
from lightning_unlearn.exceptions import (
    MissingDeltaError,
    MissingRequirementError,
    StoreCorruptedError,
    StoreMismatchError,
)
from lightning_unlearn.functional.pruning import Pruning
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import LayerDelta, StepStatus
from tests.helpers.stores import SIZES, Plain, Steps, make_store

NAMES = ("a", "b", "c", "d")
SHAPES = ((20, 15), (8,), (4, 4, 4), ())


def by_hand(steps, amounts, keep=lambda name: 1.0):
    """The sum in plain float64 numpy, layer by layer."""
    totals = {}
    for step, amount in amounts.items():
        for delta in steps[step]["deltas"]:
            dense = np.zeros(SIZES[delta.layer])
            dense[slice(None) if delta.indices is None else delta.indices.numpy()] = delta.values.numpy()
            count = math.ceil(keep(NAMES[delta.layer]) * dense.size)
            order = np.argsort(-np.abs(dense), kind="stable")
            dense[order[count:]] = 0.0
            totals[NAMES[delta.layer]] = totals.get(NAMES[delta.layer], 0.0) + amount * dense
    return {name: total.reshape(SHAPES[NAMES.index(name)]) for name, total in totals.items()}


@pytest.fixture(scope="module", params=[0.1, 1.0])
def recorded(request, tmp_path_factory):
    store, steps = make_store(tmp_path_factory.mktemp("s") / "s"), Steps(keep=request.param)
    with store.writer() as writer:
        steps.fill(writer, 8)
    return DeltaStore.open(store.url), steps


AMOUNTS = {6: 0.25, 1: 1.0, 3: -2.0, 7: 1 / 3}


@pytest.mark.parametrize("keep", [None, 1.0, 0.25, 0.02, {"a": 0.03, "[bc]": 0.25, "*": 0.5}, {"b": 0.5}])
def test_against_plain_numpy(recorded, keep):
    store, steps = recorded

    def fraction(name):
        if not isinstance(keep, dict):
            return 1.0 if keep is None else keep
        return next((value for pattern, value in keep.items() if fnmatchcase(name, pattern)), 1.0)

    total, want = accumulate(store, AMOUNTS, keep=keep), by_hand(steps, AMOUNTS, fraction)
    assert set(total) == set(want)
    for name, tensor in total.items():
        assert tensor.dtype == torch.float64
        assert tensor.shape == SHAPES[NAMES.index(name)]
        np.testing.assert_allclose(tensor.numpy(), want[name], rtol=0, atol=1e-17)


def test_the_order_of_the_amounts_does_not_matter(recorded):
    store, _ = recorded
    one, other = accumulate(store, AMOUNTS), accumulate(store, dict(sorted(AMOUNTS.items())))
    assert all(torch.equal(one[name], other[name]) for name in one)


def pruned_by_hand(steps, pruning):
    """The dense float64 sum, then the largest entries of every layer by a stable sort."""
    totals = by_hand(steps, AMOUNTS)
    for name, total in totals.items():
        order = np.argsort(-np.abs(total.reshape(-1)), kind="stable")
        total.reshape(-1)[order[math.ceil(pruning.fraction_of(name) * total.size) :]] = 0.0
    return totals


@pytest.mark.parametrize("keep", [1.0, 0.25, 0.02, {"a": 0.03, "[bc]": 0.25}, {"b": 0.5, "*": 1.0}])
@pytest.mark.parametrize("memory_bytes", [1, None])
def test_pruned_once_on_the_sum(tmp_path, keep, memory_bytes):
    store, steps = make_store(tmp_path / "s", keep=1.0), Steps(keep=1.0)
    with store.writer() as writer:
        steps.fill(writer, 8)
    store = DeltaStore.open(store.url)
    pruning = Pruning(keep, "sum")
    groups = list(layer_sums(store, AMOUNTS, keep=pruning, memory_bytes=memory_bytes))
    assert len(groups) == (4 if memory_bytes else 1)
    total, want = {name: one for group in groups for name, one in group.items()}, pruned_by_hand(steps, pruning)
    assert set(total) == set(want)
    for name, tensor in total.items():
        assert np.array_equal(tensor.numpy() != 0, want[name] != 0)
        np.testing.assert_allclose(tensor.numpy(), want[name], rtol=0, atol=1e-17)
    by_step = accumulate(store, AMOUNTS, keep=keep)
    assert all(torch.equal(total[name], by_step[name]) for name in total) == (keep == 1.0)


def test_the_sum_of_pruned_deltas_is_not_pruned_again(tmp_path):
    for number, settings in enumerate(({"keep": 0.5}, {"keep": 1.0, "keep_overrides": {"b": 0.5}})):
        store = make_store(tmp_path / str(number), **settings)
        with pytest.raises(MissingRequirementError, match=r"keep=1\.0"):
            accumulate(store, {}, keep=Pruning(0.1, "sum"))


@pytest.mark.parametrize("when", ["step", "sum"])
def test_random_entries_are_those_of_the_seed_and_the_layers_name(tmp_path, when):
    class Reversed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, one in reversed(list(Plain().named_parameters())):
                self.register_parameter(name, one)

    steps, totals = Steps(keep=1.0), {}
    for order, module in (("plain", Plain()), ("reversed", Reversed())):
        store = make_store(tmp_path / order, module=module, keep=1.0)
        with store.writer() as writer:
            for step in range(8):
                deltas = steps[step]["deltas"]
                if order == "reversed":
                    deltas = [dataclasses.replace(delta, layer=3 - delta.layer) for delta in reversed(deltas)]
                writer.append(**{**steps[step], "deltas": deltas})
        store.refresh()
        for seed in (0, 1):
            totals[order, seed] = accumulate(store, AMOUNTS, keep=Pruning(0.25, when, "random", seed))
    for seed in (0, 1):
        for name, one in totals["plain", seed].items():
            assert torch.equal(one, totals["reversed", seed][name]), name
    one, other = totals["plain", 0]["a"], totals["plain", 1]["a"]
    assert not torch.equal(one != 0, other != 0)
    full = accumulate(store, AMOUNTS)["a"]
    kept = one != 0
    if when == "sum":
        assert int(kept.sum()) == 75
        assert torch.equal(one[kept], full[kept])
        largest = Pruning(0.25, "sum").positions(full.flatten(), 75, "a")
        assert not torch.equal(torch.nonzero(kept.flatten()).flatten(), largest)
    else:  # each of four steps draws for itself
        assert 75 < int(kept.sum()) <= 4 * 75


def test_nothing(recorded):
    assert accumulate(recorded[0], {}) == {}


def test_buffers_only_where_asked(tmp_path):
    store = make_store(tmp_path / "s", buffers="record")
    with store.writer() as writer:
        writer.append(
            **{**Steps()[0], "deltas": [LayerDelta(4, None, torch.arange(5.0)), LayerDelta(3, None, torch.ones(1))]}
        )
    store.refresh()
    assert list(accumulate(store, {0: 2.0})) == ["d"]
    both = accumulate(store, {0: 2.0}, kinds=("parameter", "buffer"))
    assert both["mean"].tolist() == [0, 2, 4, 6, 8]
    assert list(accumulate(store, {0: 2.0}, kinds=("buffer",))) == ["mean"]


def test_a_missing_delta(tmp_path):
    store = make_store(tmp_path / "s")
    with store.writer() as writer:
        writer.append(**Steps().without_delta(0, StepStatus.UNWATCHED))
    store.refresh()
    with pytest.raises(MissingDeltaError, match="UNWATCHED"):
        accumulate(store, {0: 1.0})


@pytest.mark.parametrize("keep", [None, 0.02])
def test_the_size_needs_no_more_memory_than_it_is_given(recorded, keep):
    store, _ = recorded
    totals = accumulate(store, AMOUNTS, keep=keep).values()
    want = math.sqrt(sum(float(total.square().sum()) for total in totals))
    for memory_bytes in (1, 2**30):
        norm, changed = sum_size(store, AMOUNTS, keep=keep, memory_bytes=memory_bytes)
        assert norm == pytest.approx(want, rel=1e-14)
        assert changed == sum(int((total != 0).sum()) for total in totals)


FORMS = {
    "contiguous": lambda tensor: tensor.clone(),
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() == 2 else tensor.clone(),
    "every second": lambda tensor: torch.stack([tensor, tensor], -1).select(-1, 1),
    "parameter": lambda tensor: torch.nn.Parameter(tensor.clone()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("memory_bytes", [1, 2**30])
def test_subtraction_rounds_once_whatever_the_tensor(recorded, dtype, form, memory_bytes):
    store, _ = recorded
    weights = {
        name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in zip(NAMES, SHAPES, strict=True)
    }
    targets = {name: FORMS[form](tensor) for name, tensor in weights.items()}
    subtract_from(targets, store, AMOUNTS, memory_bytes=memory_bytes)
    for name, total in accumulate(store, AMOUNTS).items():
        assert torch.equal(targets[name].detach(), (weights[name].double() - total).to(dtype))
    assert not torch.equal(targets["a"].detach(), weights["a"])


def test_each_shard_gets_its_part(recorded):
    store, _ = recorded
    whole = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in zip(NAMES, SHAPES, strict=True)}
    subtract_from(whole, store, AMOUNTS)
    shards = {name: torch.zeros(whole[name].reshape(-1)[1:7].shape, dtype=torch.float64) for name in NAMES}
    subtract_from(shards, store, AMOUNTS, part=lambda layer, total: total.reshape(-1)[1:7])
    assert all(torch.equal(shards[name], whole[name].reshape(-1)[1:7]) for name in NAMES)


@pytest.mark.parametrize("fault", ["missing", "shape", "dtype", "damaged", "unwatched"])
def test_nothing_is_subtracted_where_something_is_wrong(tmp_path, fault):
    store = make_store(tmp_path / "s")
    with store.writer() as writer:
        Steps().fill(writer, 3)
        writer.append(**Steps().without_delta(3, StepStatus.UNWATCHED))
    targets = {name: torch.zeros(shape) for name, shape in zip(NAMES, SHAPES, strict=True)}
    amounts = dict.fromkeys(range(4 if fault == "unwatched" else 3), 1.0)
    error = StoreMismatchError
    if fault == "missing":
        del targets["d"]
    if fault == "shape":
        targets["d"] = torch.zeros(1)
    if fault == "dtype":
        targets["d"] = torch.zeros((), dtype=torch.int64)
    if fault == "damaged":
        error = StoreCorruptedError
        (segment,) = (tmp_path / "s" / "rank-00000").glob("segment-*")
        segment.write_bytes(segment.read_bytes()[:-1] + b"?")  # the last byte of the last layer of the last step
    if fault == "unwatched":
        error = MissingDeltaError
    with pytest.raises(error):
        subtract_from(targets, DeltaStore.open(store.url), amounts, memory_bytes=1)
    assert not any(target.any() for target in targets.values())
