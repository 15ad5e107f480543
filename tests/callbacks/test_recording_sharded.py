"""What several processes record of layers that are whole, or in pieces, is what one process records."""

import pytest
import torch

from lightning_unlearn.functional.pruning import largest_entries
from lightning_unlearn.functional.selection import Selector
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.parameters import tensors_digest
from tests.callbacks.sharded_training import DENSE, GLOBAL_BATCH, KINDS, STEPS, train
from tests.helpers.replay import replayed

KEEP = 0.3
TOLERANCE = 1e-6
"""Of the largest entry: processes add gradients up in another order than one process does."""


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def recordings(gloo_pool, made, tmp_path_factory):
    """Kind -> (dense store, pruned store, final weights); trained once for all tests."""

    def record(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            processes = 1 if kind.startswith("alone") else 2
            run = gloo_pool.run if processes == 2 else lambda function, *args, **kwargs: [function(*args, **kwargs)]
            plain = run(train, kind, None, processes)
            dense = run(train, kind, str(folder / "dense"), processes, **DENSE)
            pruned = run(train, kind, str(folder / "pruned"), processes, keep=KEEP, value_dtype="float32")
            for weights in (*dense, *pruned):
                assert all(torch.equal(weights[name], plain[0][name]) for name in plain[0])
            made[kind] = DeltaStore.open(folder / "dense"), DeltaStore.open(folder / "pruned"), plain[0]
        return made[kind]

    return record


def alone_of(kind):
    return "alone8" if kind == "tensor" else "alone"


def whole(delta, numel):
    values = torch.zeros(numel)
    values[slice(None) if delta.indices is None else delta.indices.long()] = delta.values
    return values


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_one_process(recordings, kind):
    ours, _, weights = recordings(kind)
    theirs, _, reference = recordings(alone_of(kind))
    assert ours.n_steps == theirs.n_steps == STEPS
    for step in range(STEPS):
        record = ours.record(step)
        assert sorted(record.sample_ids) == sorted(theirs.record(step).sample_ids)
        assert record.batch_size == len(record.sample_ids) == GLOBAL_BATCH
        deltas, expected = ours.read(step), theirs.read(step)
        assert list(deltas) == list(expected)
        for name in expected:
            numel = weights[name].numel()
            a, b = whole(deltas[name], numel), whole(expected[name], numel)
            assert float((a - b).abs().max()) <= TOLERANCE * max(1.0, float(b.abs().max()))
    assert all(torch.allclose(weights[name], reference[name], atol=1e-5) for name in reference)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_and_deltas_lead_to_the_weights_that_the_store_knows(recordings, kind):
    for store, tolerance in zip(recordings(kind)[:2], (1e-7, None), strict=True):
        weights = recordings(kind)[2]
        state = store.state_of(tensors_digest(weights))
        assert state is not None
        assert state.ranges == ((0, STEPS),)
        if tolerance is not None:
            found = replayed(store)
            largest = max(float(one.abs().max()) for one in weights.values())
            assert all(
                float((found[name] - weights[name].double()).abs().max()) <= tolerance * largest for name in weights
            )


@pytest.mark.parametrize("kind", [*KINDS, "alone"])
def test_what_is_kept_of_a_layer_is_the_largest_of_it_all(recordings, kind):
    dense, pruned, weights = recordings(kind)
    for step in range(STEPS):
        complete, kept = dense.read(step), pruned.read(step)
        assert list(complete) == list(kept)
        for name, delta in kept.items():
            change = whole(complete[name], weights[name].numel())
            count = -(-3 * change.numel() // 10)
            chosen = largest_entries(change, count, Selector())
            places = torch.arange(change.numel()) if delta.indices is None else delta.indices
            assert places.tolist() == chosen.tolist()
            assert torch.equal(delta.values, change[places.long()])


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "tensor"])
def test_every_process_records_the_piece_it_holds(recordings, kind):
    dense, _, weights = recordings(kind)
    numbers = {piece.layer for piece in dense.pieces}
    names = [layer.name for layer in dense.signature.layers]
    assert {names[number] for number in numbers} >= {"net.hidden.weight", "net.head.weight"}
    for step in range(STEPS):
        sizes = [int(part.step.entries["kept"].sum()) for part in dense.reader.parts(step)]
        assert sum(sizes) == sum(one.numel() for one in weights.values())
        assert max(sizes) <= 0.75 * sum(sizes)
