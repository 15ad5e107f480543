"""Every flavour of DDP records what one process records that trains on the same batches.

The oracle of each row is a fit on one process whose batches are those of both ranks together; and the same fit on two
processes without the recorder, whose weights are the same bit for bit.
"""

import math
import os
import socket
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional
from torch.utils.data import DistributedSampler, Sampler

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.parameters import weights_digest
from tests.helpers.models import CLASSES, FEATURES, IdDataset, loader, quiet_trainer
from tests.helpers.replay import assert_leads_to

DENSE = {"keep": 1.0, "value_dtype": "float32"}
BATCH = 4
"""Samples of each rank."""
TOLERANCE = 1e-6
"""Of a recorded change, against steps of 1e-3 to 1e-2: two processes add gradients up in another order."""


class Net(LightningModule):
    """No BatchNorm, so that a batch in two halves is the batch; layers of which two shares are about even."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.inp, self.head = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def hidden(self, batch):
        return self.one(self.inp(batch["x"]).relu()).relu()

    def training_step(self, batch, batch_idx):
        hidden = self.hidden(batch)
        return functional.cross_entropy(self.head(hidden + self.two(hidden)), batch["y"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class SometimesUnused(Net):
    """`two` is out of use for the samples of the second rank in every second step, and for all in every third."""

    def training_step(self, batch, batch_idx):
        hidden = self.hidden(batch)
        first = torch.arange(len(hidden)) < len(hidden) // 2  # rows of the first rank, in a batch of both
        if batch_idx % 3 == 2 or (batch_idx % 2 and self.global_rank == 1):
            pass
        elif batch_idx % 2 and self.trainer.world_size == 1:
            hidden = hidden + self.two(hidden) * first[:, None]
        else:
            hidden = hidden + self.two(hidden)
        return functional.cross_entropy(self.head(hidden), batch["y"])


class Hooked(Net):
    """Gradients go through a communication hook; Lightning's own argument for one does nothing on a CPU."""

    def __init__(self, hook):
        super().__init__()
        self.hook, self.calls = hook, 0

    def on_fit_start(self):
        if self.trainer.world_size > 1:
            self.trainer.strategy.model.register_comm_hook(None, self.counting)

    def counting(self, state, bucket):
        self.calls += 1
        return self.hook(state, bucket)

    def on_train_end(self):
        assert (self.calls > 0) == (self.trainer.world_size > 1)


class Manual(Net):
    """Two optimizers, and manual optimization."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        rest = [*self.inp.parameters(), *self.one.parameters(), *self.two.parameters()]
        return torch.optim.SGD(rest, lr=0.05), torch.optim.AdamW(self.head.parameters(), lr=1e-3, eps=1e-3)


class Zero(Net):
    """Every rank updates its part of the parameters, and sends it to the other."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def configure_optimizers(self):
        if self.trainer.world_size == 1:
            return super().configure_optimizers()
        kwargs = {"optimizer_class": torch.optim.SGD, "lr": 0.05, "momentum": 0.9, **self.options}
        return ZeroRedundancyOptimizer(list(self.parameters()), **kwargs)


# name -> (module, arguments of DDP, arguments of the Trainer, tolerance)
FLAVOURS = {
    "plain": (Net, {}, {}, TOLERANCE),
    "static graph": (Net, {"static_graph": True}, {}, TOLERANCE),
    "unused parameters": (SometimesUnused, {"find_unused_parameters": True}, {}, TOLERANCE),
    "accumulation": (Net, {}, {"accumulate_grad_batches": 2}, TOLERANCE),
    "bucket views": (Net, {"gradient_as_bucket_view": True}, {}, TOLERANCE),
    "small buckets": (Net, {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True}, {}, TOLERANCE),
    "hook": (lambda: Hooked(allreduce_hook), {}, {}, TOLERANCE),
    "hook to 16 bits": (lambda: Hooked(fp16_compress_hook), {}, {}, 1e-4),
    "two optimizers": (Manual, {}, {}, TOLERANCE),
    "zero": (Zero, {}, {}, TOLERANCE),
    "zero, as buckets": (lambda: Zero(parameters_as_bucket_view=True), {}, {"accumulate_grad_batches": 2}, TOLERANCE),
    "clipping": (Net, {}, {"gradient_clip_val": 0.1}, TOLERANCE),
}


class AllRanks(Sampler):
    """Batches of all ranks together, as Lightning's own `DistributedSampler` deals them out, padding included."""

    def __init__(self, dataset, count):
        self.sampler = self  # where Lightning looks for `set_epoch`
        self.ranks = [DistributedSampler(dataset, count, rank, shuffle=True, seed=0) for rank in range(count)]

    def set_epoch(self, epoch):
        for rank in self.ranks:
            rank.set_epoch(epoch)

    def __iter__(self):
        ranks = [list(rank) for rank in self.ranks]
        for at in range(0, len(ranks[0]), BATCH):
            yield [sample for rank in ranks for sample in rank[at : at + BATCH]]

    def __len__(self):
        return -(-len(self.ranks[0]) // BATCH)


def data(length, world, ranks=2):
    """For one process the batches that so many ranks have together."""
    dataset = IdDataset(length)
    return loader(dataset, BATCH) if world > 1 else loader(dataset, batch_sampler=AllRanks(dataset, ranks))


def train(flavour, length, store=None, world=2, strategy=None, ranks=2, **recorder):
    """The final weights of a fit of two epochs."""
    make, ddp, kwargs, _ = FLAVOURS[flavour]
    module = make()
    callbacks = [] if store is None else [DeltaRecorder(store, **{**DENSE, **recorder})]
    if world > 1:
        strategy = strategy or DDPStrategy(process_group_backend="gloo", **ddp)
        kwargs = {**kwargs, "strategy": strategy, "devices": world}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(callbacks=callbacks, **kwargs).fit(module, data(length, world, ranks))
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


def dense(store, step):
    """The change of a step by layer, in full."""
    found = {layer.name: torch.zeros(math.prod(layer.shape)) for layer in store.signature.layers}
    for name, delta in store.read(step).items():
        found[name][delta.indices if delta.indices is not None else slice(None)] = delta.values
    return found


def assert_same_recording(store, reference, tolerance):
    """Ids step by step, as often as each was trained on, and the changes."""
    assert store.n_steps == reference.n_steps
    moved = 0.0
    for step in range(store.n_steps):
        found, wanted = store.record(step), reference.record(step)
        assert Counter(found.sample_ids) == Counter(wanted.sample_ids)
        assert (found.batch_size, found.optimizer) == (wanted.batch_size, wanted.optimizer)
        changes = dense(store, step)
        for name, change in dense(reference, step).items():
            assert float((changes[name] - change).abs().max()) <= tolerance, (step, name)
            moved = max(moved, float(change.abs().max()))
    assert moved > 100 * tolerance, "a comparison of nothing with nothing"


def entries_by_rank(folder):
    """Entries that each rank stored of the first step, from the ranks' own files."""
    store = DeltaStore.open(folder)
    return [int(part.step.entries["kept"].sum()) for part in store.reader.parts(0)]


@pytest.mark.parametrize("length", [48, 43], ids=["even", "padded"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_flavour_records_what_one_process_does(gloo_pool, tmp_path, flavour, length):
    train(flavour, length, tmp_path / "one", world=1)
    plain = gloo_pool.run(train, flavour, length)
    ranks = gloo_pool.run(train, flavour, length, str(tmp_path / "two"))
    for before, after in zip(plain, ranks, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    store, reference = DeltaStore.open(tmp_path / "two"), DeltaStore.open(tmp_path / "one")
    assert (store.world_size, reference.world_size) == (2, 1)
    assert_same_recording(store, reference, FLAVOURS[flavour][3])
    module = Net()
    module.load_state_dict(ranks[0])
    assert_leads_to(store, module)
    assert store.state_of(weights_digest(module)) == store.tip
    assert store.verify().ok
    if flavour not in ("two optimizers", "unused parameters"):
        entries = entries_by_rank(tmp_path / "two")
        assert len(entries) == 2
        assert max(entries) <= 0.6 * sum(entries)  # layers are not split, and zeros not stored


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["plain", "zero", "accumulation"])
def test_four_processes_record_what_one_does(four_processes, tmp_path, flavour):
    train(flavour, 61, tmp_path / "one", world=1, ranks=4)
    plain = four_processes.run(train, flavour, 61, None, 4)
    ranks = four_processes.run(train, flavour, 61, str(tmp_path / "four"), 4)
    for before, after in zip(plain, ranks, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    store = DeltaStore.open(tmp_path / "four")
    assert store.world_size == 4
    assert_same_recording(store, DeltaStore.open(tmp_path / "one"), TOLERANCE)
    assert max(entries_by_rank(tmp_path / "four")) <= 0.5 * sum(entries_by_rank(tmp_path / "four"))


def test_an_anchor_has_the_parts_of_an_optimizer_that_is_spread_over_ranks(gloo_pool, tmp_path):
    train("plain", 48, tmp_path / "one", world=1, anchor_every=4)
    weights = gloo_pool.run(train, "zero", 48, str(tmp_path / "two"), anchor_every=4)
    store, reference = DeltaStore.open(tmp_path / "two"), DeltaStore.open(tmp_path / "one")
    assert store.anchors == reference.anchors == [4, 8, 12]
    assert all(torch.equal(store.read_anchor(12).weights[name], weights[0][name]) for name in weights[0])
    for step in store.anchors:
        found, wanted = (one.read_anchor(step).optimizers[0]["state"] for one in (store, reference))
        assert found.keys() == wanted.keys()
        for place, state in wanted.items():
            difference = found[place]["momentum_buffer"] - state["momentum_buffer"]
            assert float(difference.abs().max()) < 1e-5 < float(state["momentum_buffer"].abs().max())


def refused(store):
    module = Zero(overlap_with_ddp=True)
    trainer = quiet_trainer(
        strategy=DDPStrategy(process_group_backend="gloo"), devices=2, callbacks=[DeltaRecorder(store, **DENSE)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(module, data(48, 2))
        except UnsupportedStrategyError as error:
            return str(error), trainer.global_step
    return "", trainer.global_step


def test_updates_within_the_backward_pass_are_refused_on_every_rank(gloo_pool, tmp_path):
    for message, steps in gloo_pool.run(refused, str(tmp_path / "s")):
        assert "got 'ZeroRedundancyOptimizer(overlap_with_ddp=True)'" in message
        assert steps == 0
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_trainer_with_processes_of_its_own_records_what_one_process_does(tmp_path, monkeypatch, strategy):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    train("plain", 43, tmp_path / "one", world=1)
    plain = train("plain", 43, strategy=strategy)
    recorded = train("plain", 43, tmp_path / "two", strategy=strategy)
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)
    assert_same_recording(DeltaStore.open(tmp_path / "two"), DeltaStore.open(tmp_path / "one"), TOLERANCE)


SCRIPT = """
import sys, torch
from tests.callbacks.test_ddp_flavours import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    train("plain", 43, sys.argv[1], strategy="ddp")
"""


@pytest.mark.slow
def test_a_script_that_is_launched_again_for_every_rank_records_what_one_process_does(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    train("plain", 43, tmp_path / "one", world=1)
    root = Path(__file__).parents[2]
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert_same_recording(DeltaStore.open(tmp_path / "two"), DeltaStore.open(tmp_path / "one"), TOLERANCE)
