"""What several processes record of layers that are whole, or in pieces, is what one process records."""

import shutil

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_unlearn.deltas.accumulate import subtract_from
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import LightningUnlearnError, UnsupportedStrategyError
from lightning_unlearn.functional.pruning import kept_count, largest_entries, random_entries
from lightning_unlearn.functional.selection import Selector
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.parameters import tensors_digest
from lightning_unlearn.utilities.sharded import local_part
from tests.callbacks.sharded_training import DENSE, EPOCHS, GLOBAL_BATCH, KINDS, STEPS, Cut, train, whole
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


def refused(kind, store, settings):
    """What a recording says instead of beginning, and whether there is a store."""
    with pytest.raises(UnsupportedStrategyError) as raised:
        train(kind, store, **settings)
    return str(raised.value), DeltaStore.exists(store)


def test_anchors_of_shards_are_refused_before_anything_is_written(gloo_pool, tmp_path):
    for message, exists in gloo_pool.run(refused, "fsdp2", str(tmp_path / "store"), {"anchor_every": 2}):
        assert "anchor_every" in message
        assert "distributed" in message
        assert not exists


class Breaks(Callback):
    """Makes one entry of one process' piece infinite, in the middle of a step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 1 and trainer.global_rank == 1:
            with torch.no_grad():
                local_part(pl_module.net.hidden.weight.grad).fill_(float("nan"))


def broken(store, settings):
    with pytest.raises(LightningUnlearnError) as raised:
        train("fsdp2", store, callbacks=[Breaks()], **settings)
    return str(raised.value)


@pytest.mark.parametrize("settings", [{"keep": 0.3}, {"keep": 1.0}, {"keep": 0.3, "criterion": "random"}])
def test_all_processes_are_told_what_is_not_finite_on_one(gloo_pool, tmp_path, settings):
    for message in gloo_pool.run(broken, str(tmp_path / "store"), settings):
        assert "infinite or NaN in step 1" in message


@pytest.mark.parametrize(("scope", "criterion"), [("layer", "random"), ("global", "magnitude"), ("global", "random")])
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "tensor"])
def test_every_rule_of_selection_is_that_of_one_process(gloo_pool, recordings, tmp_path, kind, scope, criterion):
    settings = {"keep": KEEP, "value_dtype": "float32", "scope": scope, "criterion": criterion, "seed": 5}
    dense, _, weights = recordings(kind)
    gloo_pool.run(train, kind, str(tmp_path / "store"), **settings)
    store = DeltaStore.open(tmp_path / "store")
    names = [layer.name for layer in store.signature.layers]
    sizes = [weights[name].numel() for name in names]
    for step in range(STEPS):
        changes = [whole(dense.read(step)[name], size) for name, size in zip(names, sizes, strict=True)]
        flat = torch.cat(changes)
        if criterion == "magnitude":
            chosen = largest_entries(flat, kept_count(flat.numel(), KEEP), Selector())
        elif scope == "global":
            chosen = random_entries(flat.numel(), kept_count(flat.numel(), KEEP), (5, step))
        else:
            starts = [sum(sizes[:number]) for number in range(len(sizes))]
            drawn = [
                random_entries(size, kept_count(size, KEEP), (5, step, number)) for number, size in enumerate(sizes)
            ]
            chosen = torch.cat([start + places.long() for start, places in zip(starts, drawn, strict=True)])
        wanted = torch.zeros_like(flat)
        wanted[chosen.long()] = flat[chosen.long()]
        found = torch.cat(
            [
                whole(store.read(step)[name], size) if name in store.read(step) else torch.zeros(size)
                for name, size in zip(names, sizes, strict=True)
            ]
        )
        assert torch.equal(found, wanted)


def interrupted(kind, store, folder, distributed):
    """Train one epoch, and one more in a branch that is given up; then again from the checkpoint of the first."""
    if kind == "fsdp2":
        strategy = {"save_distributed_checkpoint": distributed}
    else:
        strategy = {"state_dict_type": "sharded" if distributed else "full"} if kind == "fsdp1" else {}
    checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    settings = {"enable_checkpointing": True}
    first = Cut(kind)
    train(kind, store, module=first, callbacks=[checkpoint], strategy=strategy, trainer=settings, **DENSE)
    again = Cut(kind)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    return train(kind, store, module=again, resume=f"{folder}/epoch=0.ckpt", strategy=strategy, **DENSE)


@pytest.mark.parametrize(
    ("kind", "distributed"), [("ddp", False), ("fsdp2", True), ("fsdp2", False), ("fsdp1", True), ("fsdp1", False)]
)
def test_a_resumed_recording_is_one_that_was_not_interrupted(gloo_pool, recordings, tmp_path, kind, distributed):
    dense, _, weights = recordings(kind)
    resumed, _ = gloo_pool.run(interrupted, kind, str(tmp_path / "store"), str(tmp_path / "checkpoints"), distributed)
    store = DeltaStore.open(tmp_path / "store")
    assert store.n_steps == STEPS
    assert store.pieces == dense.pieces
    assert store.state_of(tensors_digest(resumed)).ranges == ((0, STEPS),)
    found = replayed(store)
    assert all(torch.allclose(found[name].float(), resumed[name], atol=1e-6) for name in resumed)
    # Resumed from a full checkpoint, FSDP1's optimizer goes another way, with the recorder and without.
    same = STEPS // EPOCHS if (kind, distributed) == ("fsdp1", False) else STEPS
    assert same < STEPS or all(torch.equal(resumed[name], weights[name]) for name in weights)
    for step in range(STEPS):
        assert store.record(step).sample_ids == dense.record(step).sample_ids
        ours, theirs = store.read(step), dense.read(step)
        assert all(torch.equal(ours[name].values, theirs[name].values) for name in theirs) or step >= same


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp1", "tensor"])
def test_one_process_forgets_and_goes_on_from_what_two_recorded(recordings, tmp_path, kind):
    _, pruned, weights = recordings(kind)
    copy = shutil.copytree(pruned.url, tmp_path / "store")
    model = Cut(alone_of(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    store = DeltaStore.open(copy)
    plan = DeletionRequest([3, 11]).plan(store, model, scale="step")
    assert plan.steps.tolist() == [step for step in range(STEPS) if {3, 11} & set(store.record(step).sample_ids)]
    wanted = {name: one.double() for name, one in weights.items()}
    for step in plan.steps.tolist():
        for name, delta in store.read(step).items():
            wanted[name] = wanted[name] - whole(delta, wanted[name].numel()).view(wanted[name].shape)
    subtract_from(dict(model.named_parameters()), store, plan.amounts)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), wanted[name].float())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    train(alone_of(kind), str(copy), 1, module=model, keep=KEEP, value_dtype="float32")
    again = DeltaStore.open(copy)
    assert again.n_steps == 2 * STEPS
    assert all(set(again.read(step)) == set(weights) for step in range(2 * STEPS))


class Adapted(Cut):
    """Most of it is frozen, so few values are in the store at first; from the second epoch on it is trained as well."""

    def __init__(self, kind):
        super().__init__(kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(8)
            self.net.base = nn.Linear(6, 400).requires_grad_(False)

    def forward(self, x):
        return self.net(x) + self.net.base(x).tanh().mean(1, keepdim=True) * x[:, :3]

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net.base.requires_grad_(True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def adapt(kind, store):
    return train(kind, store, module=Adapted(kind), **DENSE)


def test_frozen_shards_are_left_out_until_they_are_trained(gloo_pool, tmp_path):
    weights, _ = gloo_pool.run(adapt, "fsdp2", str(tmp_path / "store"))
    store = DeltaStore.open(tmp_path / "store")
    assert set(store.frozen) == {"net.base.weight", "net.base.bias"}
    assert len(store.lineage.initial) == 1
    assert [set(store.frozen) <= set(store.read(step)) for step in range(STEPS)] == [False] * 3 + [True] * 3
    found = replayed(store)
    assert all(float((found[name] - weights[name].double()).abs().max()) <= 1e-6 for name in weights)
    assert store.state_of(tensors_digest(weights)).ranges == ((0, STEPS),)


def apart(store):
    with pytest.raises(UnsupportedStrategyError) as raised:
        adapt("ddp", store)
    return str(raised.value)


def test_weights_that_ddp_does_not_keep_together_are_noticed_on_every_process(gloo_pool, tmp_path):
    """DDP never averages what was frozen as it was set up."""
    for message in gloo_pool.run(apart, str(tmp_path / "store")):
        assert "other weights on rank 1 than on rank 0" in message
        assert "Parameters unfrozen after DDP was set up" in message
    store = DeltaStore.open(tmp_path / "store")
    assert [state.ranges for state in store.lineage.states] == [(), ((0, STEPS // EPOCHS),)]


@pytest.mark.parametrize(
    ("kind", "precision"), [("fsdp2", "bf16-mixed"), ("fsdp2", "bf16-true"), ("fsdp1", "bf16-mixed")]
)
def test_other_precisions_are_recorded_as_they_train(gloo_pool, tmp_path, kind, precision):
    settings = {"trainer": {"precision": precision}}
    plain, _ = gloo_pool.run(train, kind, **settings)
    recorded, _ = gloo_pool.run(train, kind, str(tmp_path / "store"), **settings, **DENSE)
    store = DeltaStore.open(tmp_path / "store")
    found = replayed(store)
    for name, weights in recorded.items():
        assert torch.equal(weights, plain[name])
        # Changes are formed in float32, of weights that are exact in it.
        assert float((found[name] - weights.double()).abs().max()) <= 1e-6
    assert store.state_of(tensors_digest(recorded)).ranges == ((0, STEPS),)
