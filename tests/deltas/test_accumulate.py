import math
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch

from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.exceptions import MissingDeltaError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import LayerDelta, StepStatus
from tests.helpers.stores import SIZES, Steps, make_store

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
