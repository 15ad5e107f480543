import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_unlearn.exceptions import MissingDeltaError, StoreCorruptedError
from lightning_unlearn.store.anchors import build_anchor, parse_anchor
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import DataFingerprint, LayerDelta, RecordingSettings
from lightning_unlearn.utilities.parameters import float_buffers, model_signature
from lightning_unlearn.utilities.rng import capture_rng
from tests.helpers.stores import Killed, Killer, Plain, Steps, make_store


class Net(nn.Module):
    """Dropout (random), BatchNorm (buffers), a frozen parameter, and maybe one in another memory order."""

    def __init__(self, transposed=True):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(16, 3)
        if transposed:
            self.first.weight = nn.Parameter(self.first.weight.detach().mT.contiguous().mT)
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        noise = random.random() * 1e-2 + np.random.rand() * 1e-2  # noqa: NPY002
        return self.last(self.drop(self.norm(self.first(x)).relu())) + noise


def trainable(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


OPTIMIZERS = {
    "sgd momentum": lambda module: [torch.optim.SGD(trainable(module), 0.1, momentum=0.9, nesterov=True)],
    "adamw": lambda module: [torch.optim.AdamW(trainable(module), 1e-2, amsgrad=True)],
    "adamw foreach": lambda module: [torch.optim.AdamW(trainable(module), 1e-2, foreach=True)],
    "lbfgs": lambda module: [torch.optim.LBFGS(trainable(module), 0.1, max_iter=3)],
    "two": lambda module: [
        torch.optim.RMSprop(trainable(module.first), 1e-3),
        torch.optim.Adam(trainable(module.last), 1e-2),
    ],
}


def batch(step):
    rng = np.random.default_rng(step)
    return torch.from_numpy(rng.standard_normal((8, 6)).astype(np.float32)), torch.from_numpy(rng.integers(0, 3, 8))


def train(module, optimizers, steps):
    for step in steps:
        x, y = batch(step)
        for optimizer in optimizers:

            def closure(optimizer=optimizer, x=x, y=y):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(module(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)


def state_of(module):
    return {**dict(module.named_parameters()), **float_buffers(module)}


def store_of(url, module):
    return DeltaStore.create(
        url,
        signature=model_signature(module),
        settings=RecordingSettings(keep=1.0),
        data=DataFingerprint("position", 8),
        initial=state_of(module),
    )


def append_empty(writer):
    writer.append(optimizer=0, sample_ids=[1], batch_size=1, seconds=0.0, deltas=[])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("background", [False, "auto"])
def test_a_training_goes_on_bit_for_bit(tmp_path, name, background):
    torch.manual_seed(3)
    module = Net(transposed=name != "lbfgs")  # which torch's LBFGS cannot take
    initial = copy.deepcopy(module)
    optimizers = OPTIMIZERS[name](module)
    store = store_of(tmp_path / "s", module)
    with store.writer(background=background) as writer:
        for step in range(4):
            train(module, optimizers, [step])
            append_empty(writer)
        writer.anchor(state_of(module), [one.state_dict() for one in optimizers], capture_rng())
        train(module, optimizers, range(4, 9))  # what was given is copied, so this does not change the anchor
        after = {key: tensor.detach().clone() for key, tensor in state_of(module).items()}
        numbers = (random.random(), np.random.rand(), torch.rand(2).tolist())  # noqa: NPY002
    store = DeltaStore.open(store.url)
    assert store.anchors == [4]

    anchor = store.read_anchor(4)
    assert anchor.step == 4
    again = initial
    target = state_of(again)
    assert set(anchor.weights) == set(target)
    with torch.no_grad():
        for key, tensor in anchor.weights.items():
            target[key].copy_(tensor)
    optimizers = OPTIMIZERS[name](again)
    for optimizer, state in zip(optimizers, anchor.optimizers, strict=True):
        optimizer.load_state_dict(state)
    again.norm.num_batches_tracked.copy_(module.norm.num_batches_tracked)  # an integer that no result depends on
    anchor.rng.restore()
    train(again, optimizers, range(4, 9))
    for key, tensor in state_of(again).items():
        assert torch.equal(tensor.detach(), after[key]), key
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == numbers  # noqa: NPY002


def anchored(url, ranks=1, **settings):
    """Six steps and anchors after steps 2, 4 and 6; a rank's weights are full of the step and its generator's too."""
    store = make_store(url, world_size=ranks, **settings)
    for rank in range(ranks):
        with store.writer(rank) as writer:
            for step in range(6):
                mine = [delta for delta in Steps()[step]["deltas"] if delta.layer % ranks == rank]
                writer.append(**{**Steps()[step], "deltas": mine})
                if step % 2:
                    weights = {"a": torch.full((20, 15), float(step + 1))} if rank == 0 else None
                    torch.manual_seed(100 * rank + step)
                    writer.anchor(weights, None if weights is None else [{"lr": 0.1}], capture_rng())
    return DeltaStore.open(store.url)


def test_of_several_ranks(tmp_path):
    store = anchored(tmp_path / "s", ranks=2)
    assert store.anchors == [2, 4, 6]
    for rank in range(2):
        anchor = store.read_anchor(4, rank)
        assert torch.equal(anchor.weights["a"], torch.full((20, 15), 4.0))  # rank 0 kept them for both
        assert anchor.optimizers == [{"lr": 0.1}]
        anchor.rng.restore()
        assert torch.initial_seed() == 100 * rank + 3


def test_only_steps_that_every_rank_has(tmp_path):
    store = anchored(tmp_path / "s", ranks=2)
    with store.writer(1) as writer:
        writer.truncate(3)
    store.refresh()
    assert store.n_steps == 3
    assert store.anchors == [2]
    assert store.read_anchor(2, 1).weights is not None


@pytest.mark.parametrize(("n_steps", "left"), [(0, []), (1, []), (2, [2]), (3, [2]), (5, [2, 4]), (6, [2, 4, 6])])
def test_truncation_removes_what_contains_later_steps(tmp_path, n_steps, left):
    store = anchored(tmp_path / "s")
    with store.writer() as writer:
        writer.truncate(n_steps)
    store.refresh()
    assert store.anchors == left
    files = sorted(path.name[:15] for path in (tmp_path / "s").rglob("anchor-*"))
    assert files == [f"anchor-{step:08d}" for step in left]
    assert store.verify().ok


def test_it_is_there_with_the_steps_before_it(tmp_path):
    store, steps = make_store(tmp_path / "s"), Steps()
    with store.writer(background=False) as writer:
        steps.fill(writer, 3)
        writer.anchor({"a": torch.ones(2)}, [], None)
        store.refresh()
        assert (store.n_steps, store.anchors) == (3, [3])
        anchor = store.read_anchor(3)
        assert (anchor.optimizers, anchor.rng) == ([], None)
        steps.fill(writer, 1)
    store.refresh()
    assert (store.n_steps, store.anchors) == (4, [3])
    with pytest.raises(MissingDeltaError, match="3"):
        store.read_anchor(2)


def test_merging_and_purging_of_nothing_keep_them(tmp_path):
    store = anchored(tmp_path / "s")
    store.compact()
    store.purge(["nobody"])
    assert DeltaStore.open(store.url).anchors == [2, 4, 6]


@pytest.mark.parametrize("position", [5, -1])
def test_damage_is_typed(tmp_path, position):
    store = anchored(tmp_path / "s")
    path = next((tmp_path / "s" / "rank-00000").glob("anchor-00000004-*"))
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreCorruptedError, match="anchor-00000004"):
        store.read_anchor(4)
    path.unlink()
    with pytest.raises(StoreCorruptedError, match="anchor-00000004"):
        store.read_anchor(4)
    assert store.read_anchor(2).weights is not None


def test_the_file_is_plain_safetensors(tmp_path):
    from safetensors import safe_open

    anchored(tmp_path / "s")
    path = next((tmp_path / "s" / "rank-00000").glob("anchor-00000002-*"))
    with safe_open(path, "pt") as opened:
        assert torch.equal(opened.get_tensor("weights/a"), torch.full((20, 15), 2.0))
        metadata = opened.metadata()
    assert metadata["format"] == "lightning-unlearn/anchor"
    assert (metadata["rank"], metadata["step"]) == ("0", "2")
    assert json.loads(metadata["state"])["optimizers"] == {"list": [{"dict": [["lr", 0.1]]}]}


def test_shared_memory_and_foreign_metadata():
    whole = torch.arange(6.0)
    weights = {"a": whole, "b": whole[2:4], "c": whole.view(2, 3).mT}
    built = build_anchor(7, weights, None, None, store_id="s", rank=0)
    anchor = parse_anchor(built.data, 7, built.digest)
    assert all(torch.equal(anchor.weights[name], tensor) for name, tensor in weights.items())
    with pytest.raises(ValueError, match="checksum"):
        parse_anchor(built.data + b"x", 7, built.digest)


def test_a_state_that_cannot_be_kept_is_refused_before_anything_is_written(tmp_path):
    store = make_store(tmp_path / "s")
    with store.writer() as writer:
        Steps().fill(writer, 1)
        with pytest.raises(TypeError, match="optimizers/0/hook"):
            writer.anchor({}, [{"hook": print}], None)
        Steps().fill(writer, 1)
    store.refresh()
    assert (store.n_steps, store.anchors) == (2, [])


@pytest.mark.parametrize("background", [False, "auto"])
def test_a_crash_at_every_primitive(tmp_path, monkeypatch, background):
    outcomes, steps = set(), Steps()
    for survive in range(40):
        store = make_store(tmp_path / str(survive))
        writer = store.writer(background=background)
        steps.fill(writer, 2)
        writer.flush()
        with monkeypatch.context() as patch:
            killer = Killer(survive, torn=True).install(patch)
            steps.fill(writer, 2)
            try:
                writer.anchor(dict(Plain().named_parameters()), [], capture_rng())
                writer.flush()
            except Killed:
                assert killer.struck
            writer.abandon()
        healed = DeltaStore.open(store.url)
        assert healed.verify().ok
        assert (healed.n_steps, healed.anchors) in ((2, []), (4, [4]))
        if healed.anchors:
            assert torch.equal(healed.read_anchor(4).weights["b"], Plain().b)
        outcomes.add(healed.n_steps)
        with healed.writer() as again:
            steps.fill(again, 1)
        healed.refresh()
        assert healed.verify().ok
        assert not healed.verify().orphans
        if not killer.struck:
            break
    assert not killer.struck
    assert outcomes == {2, 4}


def test_a_writer_of_all_ranks_keeps_them_as_rank_0s(tmp_path):
    from lightning_unlearn.store.joined_writer import JoinedWriter

    store = make_store(tmp_path / "s", world_size=2)
    joined = JoinedWriter(store)
    values = [LayerDelta(1, None, torch.ones(8))]
    step = {"optimizer": 0, "sample_ids": [1], "batch_size": 1, "seconds": 0.0}
    joined.append(**step, deltas=lambda: values, pruning_error=0.5, edited=True)
    joined.anchor({"a": torch.ones(2)}, [], capture_rng())
    joined.close()
    store.refresh()
    assert store.anchors == [1]
    assert store.read_anchor(1, 0).rng is not None
    record = store.record(0)
    assert (record.pruning_error, record.edited) == (0.5, True)
