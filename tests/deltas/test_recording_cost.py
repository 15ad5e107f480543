"""What a recording was predicted to cost, against what is recorded, counted and shared out."""

import math
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.callbacks.captured_layers import Layer, equal_bits
from lightning_unlearn.callbacks.delta_capture import DeltaCapture
from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.callbacks.device_selection import DeviceSelection
from lightning_unlearn.deltas import recording_seconds
from lightning_unlearn.deltas.recording_advice import recording_advice
from lightning_unlearn.deltas.recording_cost import recording_cost, touched_share
from lightning_unlearn.deltas.recording_plan import PlannedRecording
from lightning_unlearn.deltas.recording_rates import ASSUMED_DEVICE, DEFAULT_RATES
from lightning_unlearn.store.commits import read_commit
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import LayerInfo, ModelSignature, RecordingSettings
from lightning_unlearn.utilities.files import Files
from lightning_unlearn.utilities.parameters import model_signature
from tests.helpers.models import quiet_trainer

ROWS, BATCH, EPOCHS = 128, 16, 2
STEPS = EPOCHS * ROWS // BATCH


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(40, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 300), nn.ReLU())
        self.fixed = nn.Linear(300, 300).requires_grad_(False)
        self.head = nn.Linear(300, 10)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.head(self.fixed(self.net(batch[0]))), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam([one for one in self.parameters() if one.requires_grad], lr=1e-3)


def frozen_of(module):
    return frozenset(name for name, parameter in module.named_parameters() if not parameter.requires_grad)


def train(url, processes, kwargs):
    torch.manual_seed(3)
    module, x = Net(), torch.randn(ROWS, 40)
    many = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(max_epochs=EPOCHS, callbacks=DeltaRecorder(url, **kwargs), **many)
        trainer.fit(module, DataLoader(TensorDataset(x, x[:, :10].argmax(1)), BATCH // processes, shuffle=True))


def keys(position):
    return f"user-{position:05d}"


CASES = {
    "default": {},
    "zstd": {"compression": "zstd", "value_dtype": "bfloat16"},
    "whole": {"keep": 1.0, "value_dtype": "float32"},
    "patterns": {"keep": {"*.bias": 1.0, "*": 0.02}, "value_dtype": "int8", "compression": "zstd"},
    "anchors": {"anchor_every": 4, "buffers": "record"},
    "keys": {"keep": 0.001, "sample_keys": keys},
}


def planned(settings, case, ranks=1):
    module = Net()
    return PlannedRecording(
        model_signature(module),
        settings,
        steps=STEPS,
        batch_size=BATCH,
        frozen=frozen_of(module),
        samples=ROWS,
        ranks=ranks,
        checkpoints=EPOCHS + 1,
        anchor_every=case.get("anchor_every"),
        optimizer_tensors=2,
        key_bytes=10 if "sample_keys" in case else None,
    )


def payloads(store):
    """Bytes of positions and values by rank."""
    commits = [read_commit(Files(store.url), store.store_id, rank) for rank in range(store.world_size)]
    return [sum(ref.payload_bytes for ref in commit.segments) for commit in commits]


def sizes(store, root):
    """Bytes of a store by part, as its files say."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {
        "deltas": sum(payloads(store)),
        "initial": sum(path.stat().st_size for path in files if path.name.startswith("initial")),
        "anchors": sum(path.stat().st_size for path in files if path.name.startswith("anchor")),
        "total": sum(path.stat().st_size for path in files),
    }


def assert_close(cost, found):
    predicted = {
        **{part.name: getattr(cost.bytes, part.name) for part in fields(cost.bytes)},
        "total": cost.bytes.total,
    }
    predicted["deltas"] = cost.bytes.deltas
    for part, size in found.items():
        assert predicted[part] == pytest.approx(size, rel=0.2, abs=600), part


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_one_process(tmp_path, name):
    train(str(tmp_path / "store"), 1, CASES[name])
    store = DeltaStore.open(tmp_path / "store")
    cost = recording_cost(planned(store.settings, CASES[name]))
    assert store.n_steps == STEPS
    assert_close(cost, sizes(store, tmp_path / "store"))
    held = sum(store.read(STEPS - 1)[name].values.numel() for name in store.read(STEPS - 1))
    assert 0.8 * cost.kept <= held <= cost.kept


@pytest.mark.parametrize("name", ["default", "zstd"])
def test_bytes_of_two_processes(gloo_pool, tmp_path, name):
    gloo_pool.run(train, str(tmp_path / "store"), 2, CASES[name])
    store = DeltaStore.open(tmp_path / "store")
    cost = recording_cost(planned(store.settings, CASES[name], 2))
    assert_close(cost, sizes(store, tmp_path / "store"))
    for found, rank in zip(payloads(store), cost.ranks, strict=True):
        assert found > 0
        assert rank.deltas == pytest.approx(found, rel=0.2)


def test_unwatched_steps_have_no_delta(tmp_path):
    train(str(tmp_path / "store"), 1, {"watch": [5]})
    store = DeltaStore.open(tmp_path / "store")
    plan = replace(planned(store.settings, {}), watched=touched_share(ROWS / BATCH, 1))
    assert plan.stored_steps == EPOCHS
    assert_close(recording_cost(plan), sizes(store, tmp_path / "store"))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_each_rank_has_the_layers_that_it_captures(scope):
    module, settings = Net(), RecordingSettings(keep=0.1, scope=scope, buffers="record")
    plan = PlannedRecording(model_signature(module), settings, 1, 3, frozen=frozen_of(module), ranks=3)
    for rank, pieces in enumerate(plan.pieces):
        optimizer = module.configure_optimizers()
        capture = DeltaCapture(module, settings, rank=rank, world_size=3)
        capture.watch(optimizer)
        with torch.no_grad():
            for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
                tensor += torch.rand_like(tensor) + 0.1
        deltas = capture.changes(optimizer, 0).deltas
        names = {module_name(module, delta.layer): delta.values.numel() for delta in deltas}
        if scope == "layer":
            assert names == {piece.layer.name: piece.kept for piece in pieces}
        else:
            assert set(names) <= {piece.layer.name for piece in pieces}


def module_name(module, number):
    return model_signature(module).layers[number].name


def test_shards_are_rows():
    layers = (LayerInfo("w", (10, 30), "float32"), LayerInfo("b", (3,), "float32"), LayerInfo("s", (), "float32"))
    plan = PlannedRecording(
        ModelSignature(layers), RecordingSettings(keep=0.1), steps=1, batch_size=4, ranks=4, sharded=True
    )
    for rank, pieces in enumerate(plan.pieces):
        for layer in layers:
            rows = torch.empty(layer.shape or (1,)).chunk(4)
            own = rows[rank].numel() if rank < len(rows) else 0
            assert sum(piece.numel for piece in pieces if piece.layer is layer) == own
    assert sum(piece.kept for pieces in plan.pieces for piece in pieces if piece.layer.name == "w") == 30
    cost = recording_cost(plan)
    # of w and b something is left out: three histograms of 2048 numbers of each
    assert cost.network_bytes == 2 * 3 / 4 * 2 * 3 * 2048 * 4
    assert cost.slowest.network > 0
    assert recording_cost(replace(plan, sharded=False)).network_bytes == 0
    for memory, pieces in zip(cost.memory, plan.pieces, strict=True):
        assert memory.previous == 4 * sum(piece.numel for piece in pieces)
        assert memory.scratch == memory.previous + 13 * max((p.numel for p in pieces if not p.is_whole), default=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranks": 0}, "`ranks`"),
        ({"watched": 0.0}, "`watched`"),
        ({"anchor_every": 0}, "`anchor_every`"),
        ({"frozen": frozenset({"weight"})}, "something is trained"),
        ({"frozen": frozenset({"nobody"})}, "names of parameters"),
        ({"signature": ModelSignature((LayerInfo("weight", (2,), "int64"),))}, "real floating-point"),
        ({"sharded": True, "anchor_every": 5}, "`anchor_every`"),
        ({"sharded": True, "settings": RecordingSettings(keep=0.1, scope="global")}, "scope='layer'"),
    ],
)
def test_what_cannot_be_planned(change, said):
    plan = PlannedRecording(
        ModelSignature((LayerInfo("weight", (20, 2), "float32"),)), RecordingSettings(keep=0.1), steps=1, batch_size=4
    )
    with pytest.raises(ValueError, match=said):
        replace(plan, **change)


class Counted(TorchDispatchMode):
    """Operations that would be kernels, and the bytes of what they read and write."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view and not function._schema.name.startswith(("aten::empty", "aten::detach")):
            self.kernels += 1
            read = {id(one): one for one in tree_leaves((args, kwargs or {})) if isinstance(one, torch.Tensor)}
            made = {id(one): one for one in tree_leaves(out) if isinstance(one, torch.Tensor)}
            self.bytes += sum(one.numel() * one.element_size() for one in {**read, **made}.values())
        return out


def counted(n, kept, layers):
    many = [Layer(i, "w", torch.randn(n), kept, torch.randn(n)) for i in range(layers)]
    selection = DeviceSelection(torch.device("cpu"), RecordingSettings(keep=kept / n), seed=0)
    selection.start(many, [], 0, False, None).wait()  # allocates
    with Counted() as found:
        for layer in many:
            equal_bits(layer.before, layer.tensor)
            layer.before.copy_(layer.tensor)
        selection.start(many, [], 1, False, None)
    return found


@pytest.mark.parametrize(("kept", "kernels"), [(10_000, "PRUNED_KERNELS"), (100_000, "WHOLE_KERNELS")])
def test_kernels_and_bytes_on_a_device_are_what_the_code_queues(kept, kernels):
    three, one = counted(100_000, kept, 3), counted(100_000, kept, 1)
    assert (three.kernels - one.kernels) / 2 == getattr(recording_seconds, kernels)
    each = (three.bytes - one.bytes) / 2 / 100_000
    if kept == 100_000:
        expected = recording_seconds.WHOLE_BYTES
    else:  # of `topk` three passes more are assumed than its shapes tell
        expected = recording_seconds.PRUNED_BYTES - 3 * 4 + 0.1 * recording_seconds.KEPT_BYTES
    assert each == pytest.approx(expected, rel=0.15)


def test_seconds_follow_the_rates_and_the_work():
    plan = planned(RecordingSettings(keep=0.1), {})
    base = recording_cost(plan).slowest
    rates = {
        item.name: {name: 3 * one for name, one in value.items()} if isinstance(value, dict) else 3 * value
        for item in fields(DEFAULT_RATES)
        if isinstance(value := getattr(DEFAULT_RATES, item.name), float | dict) and item.name != "thread_gain"
    }
    slow = recording_cost(plan, replace(DEFAULT_RATES, **rates)).slowest
    assert slow.inline == pytest.approx(3 * base.inline)
    assert slow.publish == pytest.approx(3 * base.publish)
    assert slow.checkpoint == pytest.approx(3 * base.checkpoint)
    assert recording_cost(replace(plan, watched=0.25)).slowest.inline < base.inline
    settings = replace(plan.settings, compression="zstd")
    assert recording_cost(replace(plan, settings=settings)).slowest.compress > 0 == base.compress
    away = recording_cost(replace(plan, device="cuda"))
    assert away.slowest.encodes_beside
    assert away.slowest.beside >= away.slowest.encode
    assert any("assumed, not measured" in line for line in away.assumptions)
    narrow = recording_cost(replace(plan, device="cuda"), device=replace(ASSUMED_DEVICE, launch=1e-3))
    assert narrow.slowest.select > away.slowest.select


def test_threads_that_fall_behind_are_waited_for():
    plan = planned(RecordingSettings(keep=1.0, compression="zstd"), {})
    slow = replace(DEFAULT_RATES, compress_byte=1e-6)  # so that the threads have more to do than the training
    cost = recording_cost(replace(plan, device="cuda"), slow)
    assert cost.share_of(10.0) == pytest.approx(cost.slowest.inline / 10)
    short = cost.beside / 2
    assert cost.share_of(short) == pytest.approx(cost.beside / short - 1)


def test_a_rank_that_selects_on_two_threads():
    layers = tuple(LayerInfo(f"w{i}", (1 << 20,), "float32") for i in range(4))
    plan = PlannedRecording(ModelSignature(layers), RecordingSettings(keep=0.1), steps=1, batch_size=1)
    one = recording_cost(plan).slowest.select
    two = recording_cost(plan, replace(DEFAULT_RATES, threads=2, thread_gain=1.6)).slowest.select
    assert two == pytest.approx(one / 1.6)


def test_touched_share_is_what_shuffling_touches():
    generator = np.random.default_rng(0)
    steps, asked, batch = 40, 12, 8
    found = [len(set(generator.permutation(steps * batch)[:asked] // batch)) / steps for _ in range(2000)]
    assert touched_share(steps, asked) == pytest.approx(np.mean(found), rel=0.02)
    assert touched_share(steps, 1) == pytest.approx(1 / steps)
    assert touched_share(0.5, 1) == 1.0


def test_few_trainable_is_the_recorders():
    layers = (LayerInfo("base", (1000, 10), "bfloat16"), LayerInfo("adapter", (100,), "float32"))
    plan = PlannedRecording(
        ModelSignature(layers), RecordingSettings(keep=1.0), steps=1, batch_size=1, frozen=frozenset({"base"})
    )
    assert recording_cost(plan).bytes.initial == 400
    wide = replace(plan, signature=ModelSignature((layers[0], LayerInfo("adapter", (1000,), "float32"))))
    assert recording_cost(wide).bytes.initial == 4000 + 20_000


def test_advice():
    plan = replace(planned(RecordingSettings(keep=0.5, value_dtype="float32"), {}), steps=10**6, samples=160_000)

    def said(plan=plan, **kwargs):
        return " ".join(recording_advice(recording_cost(plan), **kwargs))

    assert "`keep=0.1`" in said()
    assert "`value_dtype='scaled_float16'`" in said()
    assert "size_budget" in said()
    assert "anchor_every=10000" in said()
    assert "refused" in said(forget=100_000)
    assert "few steps" in said(forget=1)
    assert "most of what is subtracted" in said(forget=500)
    assert "% of a step" in said(step_seconds=1e-4)
    assert "% of a step" not in said(step_seconds=60.0)
    budget = said(size_budget=recording_cost(plan).bytes.deltas / 4)
    assert "after 250,000 of 1,000,000 steps" in budget
    fine = replace(plan, settings=RecordingSettings(keep=0.1, compression="zstd"), anchor_every=10)
    assert "`keep=" not in said(fine)
    assert "compression" not in said(fine)
    with pytest.raises(ValueError, match="`forget`"):
        said(forget=0)
    uneven = replace(plan, ranks=8)
    assert "`fixed.weight`" not in said(uneven)
    assert "`net.3.weight` alone" in said(uneven)
    assert math.isclose(sum(rank.deltas for rank in recording_cost(uneven).ranks), recording_cost(plan).bytes.deltas)
