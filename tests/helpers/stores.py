"""Small stores with known content, and a switch that ends the process's writing at the n-th primitive."""

import json
from collections import Counter

import numpy as np
import torch
from torch import nn

from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import DataFingerprint, LayerDelta, RecordingSettings, StepStatus
from lightning_unlearn.utilities.parameters import float_buffers, model_signature

SIZES = (300, 8, 64, 1)


class Plain(nn.Module):
    """Four parameters, the last one a scalar, and one float buffer."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(20, 15, generator=generator))
        self.b = nn.Parameter(torch.randn(8, generator=generator))
        self.c = nn.Parameter(torch.randn(4, 4, 4, generator=generator))
        self.d = nn.Parameter(torch.randn((), generator=generator))
        self.register_buffer("mean", torch.zeros(5))


class Steps:
    """Random steps that can be made again: the content a store must have."""

    def __init__(self, seed=0, keep=0.1, keys=False, ids=20):
        self.seed, self.keep, self.keys, self.ids = seed, keep, keys, ids

    def __getitem__(self, step):
        rng = np.random.default_rng([self.seed, step])
        deltas = []
        for layer, numel in enumerate(SIZES):
            count = int(np.ceil(self.keep * numel))
            indices = torch.from_numpy(np.sort(rng.choice(numel, count, replace=False)))
            values = torch.from_numpy(rng.standard_normal(count).astype(np.float32) * 1e-2)
            deltas.append(LayerDelta(layer, None if count == numel else indices, values))
        ids = rng.integers(0, self.ids, 4).tolist()
        ids = [f"user-{one:04d}" if self.keys and one % 2 else one for one in ids]
        return {
            "optimizer": step % 2,
            "sample_ids": ids,
            "batch_size": 4,
            "seconds": 0.25 + step,
            "deltas": deltas,
        }

    def fill(self, writer, count):
        for step in range(writer.n_steps, writer.n_steps + count):
            writer.append(**self[step])

    def without_delta(self, step, status):
        return {**self[step], "deltas": None, "status": status}


def make_store(url, *, world_size=1, module=None, **settings):
    """A new store of `Plain`: float32 values unless told otherwise."""
    module = module or Plain()
    return DeltaStore.create(
        url,
        signature=model_signature(module),
        settings=RecordingSettings(**{"keep": 0.1, "value_dtype": "float32", **settings}),
        data=DataFingerprint("key", 20),
        initial={**dict(module.named_parameters()), **float_buffers(module)},
        world_size=world_size,
    )


def same_deltas(read, deltas, names=("a", "b", "c", "d")):
    """Whether `store.read` gave back these deltas bit for bit."""
    if list(read) != [names[delta.layer] for delta in deltas]:
        return False
    pairs = zip(read.values(), deltas, strict=True)
    return all(
        torch.equal(got.values, want.values)
        and (got.indices is None) == (want.indices is None)
        and (want.indices is None or torch.equal(got.indices, want.indices))
        for got, want in pairs
    )


def holds_step(store, step, want, status=StepStatus.STORED):
    """Whether a step of a store is exactly what was appended."""
    record = store.record(step)
    plain = (record.optimizer, record.batch_size, record.seconds, record.status)
    if plain != (want["optimizer"], want["batch_size"], want["seconds"], status):
        return False
    if Counter(record.sample_ids) != Counter(want["sample_ids"]):
        return False
    return status is not StepStatus.STORED or same_deltas(store.read(step), want["deltas"])


def tensor_span(path, name):
    """Where in a safetensors file a tensor lies."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + start, 8 + length + stop


class Killed(BaseException):
    """The process is gone."""


class Killer:
    """Stands in for `Files.perform`: lets `survive` primitives through, then nothing any more.

    With `torn`, a file that was being written when it happened is left half written.
    """

    def __init__(self, survive, torn=False):
        self.survive, self.torn, self.count = survive, torn, 0

    def install(self, monkeypatch):
        killer = self

        def perform(files, primitive, *args):
            if killer.count >= killer.survive:
                if killer.torn and killer.count == killer.survive and primitive.__name__ == "_write_synced":
                    path, chunks, _ = args
                    whole = b"".join(chunks)
                    with open(path, "wb") as stream:
                        stream.write(whole[: len(whole) // 2])
                killer.count += 1
                raise Killed
            killer.count += 1
            primitive(*args)

        monkeypatch.setattr("lightning_unlearn.utilities.files.Files.perform", perform)
        return self

    @property
    def struck(self):
        return self.count > self.survive
