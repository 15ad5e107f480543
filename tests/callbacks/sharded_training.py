"""A small training that runs in one process or in two: whole, under DDP, FSDP2, FSDP1 or tensor parallel."""

import torch
import torch.distributed as dist
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.utils.data import DistributedSampler

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.utilities.whole_weights import whole_tensors
from tests.helpers.cpu_fsdp import CpuFSDPStrategy
from tests.helpers.models import IdDataset, loader, quiet_trainer

SAMPLES, GLOBAL_BATCH, EPOCHS = 24, 8, 2
STEPS = EPOCHS * SAMPLES // GLOBAL_BATCH
DENSE = {"keep": 1.0, "value_dtype": "float32"}
KINDS = ("ddp", "fsdp2", "fsdp1", "tensor")
TENSOR_PARALLEL = {"tensor": 1, "grid": 2, "alone8": 1}
"""Kinds that need eight hidden units, and how many processes see different samples."""


class Net(nn.Module):
    """Seven hidden units, so shards differ in size; an embedding of one row, which one process holds alone."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden, self.head = nn.Linear(6, hidden), nn.Linear(hidden, 3)
        self.shift = nn.Parameter(torch.zeros(1, 6))

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(x + self.shift)))


class Cut(LightningModule):
    """Cuts itself as `kind` says; no BatchNorm, so processes see what one would see."""

    def __init__(self, kind="alone", frozen=False):
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.net = Net(8 if kind in TENSOR_PARALLEL else 7)
        self.net.hidden.bias.requires_grad_(not frozen)

    def configure_model(self):
        if self.kind in ("tensor", "grid"):
            plan = {"hidden": ColwiseParallel(), "head": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        if self.kind in ("fsdp2", "grid"):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.hidden, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch["x"]), batch["y"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def replicas_of(kind, processes):
    """How many groups of processes see samples of their own."""
    return TENSOR_PARALLEL.get(kind, processes)


def strategy_of(kind, processes=2, **kwargs):
    """The strategy in which several processes train."""
    if kind in ("fsdp2", "tensor", "grid"):
        replicas = replicas_of(kind, processes)
        return ModelParallelStrategy(replicas, processes // replicas, process_group_backend="gloo", **kwargs)
    if kind == "fsdp1":
        return CpuFSDPStrategy(auto_wrap_policy={nn.Linear}, **kwargs)
    return DDPStrategy(process_group_backend="gloo", **kwargs)


def trainer_of(kind, processes=2, strategy=None, **kwargs):
    defaults = {"max_epochs": EPOCHS, "devices": processes}
    if processes > 1:
        defaults["strategy"] = strategy_of(kind, processes, **(strategy or {}))
    return quiet_trainer(**{**defaults, **kwargs})


def data_of(kind, processes=2):
    """Loaders whose batches together are the same in every kind of training."""
    replicas = replicas_of(kind, processes) if processes > 1 else 1
    rank = dist.get_rank() * replicas // processes if replicas > 1 else 0
    # Lightning's own sampler would shuffle whatever the loader says.
    sampler = DistributedSampler(range(SAMPLES), replicas, rank, shuffle=False)
    return loader(IdDataset(SAMPLES), batch_size=GLOBAL_BATCH // replicas, sampler=sampler)


def train(
    kind, store=None, processes=2, *, module=None, resume=None, callbacks=(), trainer=None, strategy=None, **recorder
):
    """Run on every process: the whole weights after the training, by name."""
    module = Cut(kind) if module is None else module
    recorders = [] if store is None else [DeltaRecorder(store, **recorder)]
    fitted = trainer_of(kind, processes, strategy, callbacks=[*recorders, *callbacks], **(trainer or {}))
    fitted.fit(module, data_of(kind, processes), ckpt_path=resume)
    return {name: one.clone() for name, one in whole_tensors(module).parameters.items()}


def whole(delta, numel):
    """A recorded change of a layer with so many entries, with its zeros."""
    values = torch.zeros(numel)
    values[slice(None) if delta.indices is None else delta.indices.long()] = delta.values
    return values
