"""Measures in a few seconds how fast this machine does what recording consists of."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.callbacks.delta_capture import DeltaCapture
from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.deltas.recording_rates import Rates
from lightning_unlearn.functional.selection import Selector
from lightning_unlearn.functional.shard_selection import Alone, select_shards
from lightning_unlearn.store.codec import encode_layer
from lightning_unlearn.store.compression import check_compression, join_payload
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.step_encoder import PendingStep, StepEncoder
from lightning_unlearn.types import DataFingerprint, LayerDelta, RecordingSettings, StepStatus, ValueDtype
from lightning_unlearn.utilities.parameters import (
    clone_parameters,
    model_signature,
    parameter_distance,
    parameter_norm,
    weights_digest,
)
from lightning_unlearn.utilities.trainers import idle_trainer

__all__ = ["measure_rates"]

_LARGE, _LARGE_LAYERS = 1 << 21, 4
_MIDDLE, _SMALL, _MANY = 10_000, 1_000, 48
_SPARSE, _DENSE = 0.02, 0.25  # one side of where positions become a mask, and the other
_REPEATS = 7


class _Layers(nn.Module):
    """Layers of some sizes, which change like those of a training: by small, normally distributed numbers."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ParameterList(torch.randn(size, generator=generator) for size in sizes)
        self._noise = torch.randn(max(sizes), generator=generator)

    @torch.no_grad()
    def change(self) -> None:
        """What an optimizer does."""
        for layer in self.layers:
            layer.add_(self._noise[: layer.numel()], alpha=1e-3)


class _OneLayer(LightningModule):
    """As little to train and to record as there can be."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cast(Tensor, self.net(batch[0]).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class _Clock(Callback):
    """When each batch was over."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(self.clock())


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class _Watch:
    """Times pieces of work: the median of some repeats, by a clock."""

    repeats: int
    clock: Callable[[], float]

    def seconds(self, work: Callable[[], object], prepare: Callable[[], object] = _nothing, times: int = 0) -> float:
        taken = []
        for _ in range(1 + (times or self.repeats)):
            prepare()
            begin = self.clock()
            work()
            taken.append(self.clock() - begin)
        return max(statistics.median(taken[1:]), 1e-9)  # the first touches memory for the first time


def measure_rates(
    folder: str | os.PathLike[str] | None = None,
    *,
    repeats: int = _REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> Rates:
    """Do what recording does, with the code that does it, on weights of no meaning.

    Nothing but this process is looked at: on a machine on which several ranks will record, cores, memory and disk are
    shared, and each rank is slower than what is measured here alone. Measure where the training will run, with as many
    threads (`torch.set_num_threads`) as each of its processes will have.

    Args:
        folder: A folder on the disk that the store will be on; by default where temporary files are. What is written
            there, about 40 MB, is removed again.
        repeats: How often each piece of work is done; the median counts.
        clock: What the time is; `time.thread_time` leaves out what other programs take, and what waits for a disk.

    Raises:
        FileNotFoundError: there is no such folder.
        MissingRequirementError: `zstandard` is missing.
    """
    check_compression("zstd")
    watch = _Watch(repeats, clock)
    figures = {**_selection(watch), **_encoding(watch)}
    with tempfile.TemporaryDirectory(prefix=".tmp-rates-", dir=folder) as place:
        figures |= _writing(Path(place), watch)
        figures["step"] = _step(Path(place), watch)
    origin = f"measured on this machine, {torch.get_num_threads()} threads"
    return Rates(origin=origin, threads=min(4, torch.get_num_threads()), **figures)  # type: ignore[arg-type]


def _capture(sizes: Sequence[int], keep: float) -> tuple[_Layers, DeltaCapture, torch.optim.Optimizer]:
    module = _Layers(sizes)
    capture, optimizer = DeltaCapture(module, RecordingSettings(keep=keep)), torch.optim.SGD(module.parameters())
    capture.watch(optimizer)
    return module, capture, optimizer


def _selection(watch: _Watch) -> dict[str, object]:
    large, middle, small = (_LARGE,) * _LARGE_LAYERS, (_MIDDLE,) * _MANY, (_SMALL,) * _MANY
    entries = sum(large)

    def seconds(sizes: Sequence[int], keep: float, what: str) -> float:
        module, capture, optimizer = _capture(sizes, keep)
        step = iter(range(1 << 30))
        work: dict[str, Callable[[], object]] = {
            "watch": lambda: capture.watch(optimizer),
            "skip": lambda: capture.skip(optimizer, 0),
            "changes": lambda: capture.changes(optimizer, next(step)),
        }
        return watch.seconds(work[what], _nothing if what == "watch" else module.change)

    together = [seconds(large, keep, "changes") for keep in (_SPARSE, _DENSE)]
    alone = [_alone(_LARGE, keep, watch) * _LARGE_LAYERS for keep in (_SPARSE, _DENSE)]
    kept = max((alone[1] - alone[0]) / (entries * (_DENSE - _SPARSE)), 1e-12)
    entry = max(alone[0] / entries - kept * _SPARSE, 1e-12)
    looking = seconds(large, _SPARSE, "watch") / entries

    def each(sizes: Sequence[int], what: str, cheap: float) -> float:
        return max(seconds(sizes, _SPARSE, what) / len(sizes) - cheap * sizes[0], 1e-9)

    return {
        "watch_entry": looking,
        "watch_layer": each(small, "watch", looking),
        "copy_entry": seconds(large, _SPARSE, "skip") / entries,
        "select_entry": entry,
        "select_kept": kept,
        "select_layer": each(middle, "changes", entry + kept * _SPARSE),
        "select_small_layer": each(small, "changes", entry + kept * _SPARSE),
        "difference_entry": seconds(large, 1.0, "changes") / entries,
        "shard_entry": _sharded(_LARGE, watch) / _LARGE,
        "thread_gain": max(1.0, sum(alone) / sum(together)),
    }


def _alone(numel: int, keep: float, watch: _Watch) -> float:
    """One layer on one thread, whatever PyTorch has."""
    module, selector = _Layers([numel]), Selector()
    after = module.layers[0].detach().numpy()
    before = after.copy()

    def work() -> None:
        selector.select(after, before, int(keep * numel))
        np.copyto(before, after)

    return watch.seconds(work, module.change)


def _sharded(numel: int, watch: _Watch) -> float:
    """Selecting from a piece of a layer, as each rank does, with nobody to exchange counts with."""
    change = _Layers([numel]).layers[0].detach()
    return watch.seconds(lambda: select_shards([[change]], [int(_SPARSE * numel)], Alone()))


def _pending(deltas: list[LayerDelta]) -> PendingStep:
    return PendingStep(0, (0,), 1, 0.0, deltas, StepStatus.STORED, None, False)


def _deltas(sizes: Sequence[int], keep: float) -> tuple[_Layers, list[LayerDelta]]:
    module, capture, optimizer = _capture(sizes, keep)
    module.change()
    found = capture.changes(optimizer, 0).deltas
    return module, found if isinstance(found, list) else found()


def _encoding(watch: _Watch) -> dict[str, object]:
    def seconds(sizes: Sequence[int], keep: float, value_dtype: ValueDtype) -> tuple[float, int]:
        module, deltas = _deltas(sizes, keep)
        encoder = StepEncoder(model_signature(module), RecordingSettings(keep=keep, value_dtype=value_dtype))
        held: list[object] = []  # as in a writer: memory that is used anew would be faster than fresh memory
        taken = watch.seconds(lambda: held.append(encoder.encode(_pending(deltas))))
        return taken, sum(delta.values.numel() for delta in deltas)

    sparse: dict[ValueDtype, float] = {}
    whole: dict[ValueDtype, float] = {}
    for value_dtype in get_args(ValueDtype):
        for rates, sizes, keep in ((sparse, (_LARGE,) * _LARGE_LAYERS, 2 * _SPARSE), (whole, (_LARGE,), 1.0)):
            taken, kept = seconds(sizes, keep, value_dtype)
            rates[value_dtype] = taken / kept
    masked, _ = seconds((_LARGE,), _DENSE, "float32")
    taken, few = seconds((_SMALL,) * _MANY, _SPARSE, "float32")
    _, deltas = _deltas((_LARGE,), _DENSE)
    layers = [encode_layer(delta, _LARGE, "bfloat16") for delta in deltas]
    plain = sum(layer.index.size + layer.value.size for layer in layers)
    held: list[object] = []
    compressing = watch.seconds(lambda: held.append(join_payload(layers, "zstd")))
    return {
        "encode_kept": sparse,
        "encode_whole": whole,
        "mask_entry": masked / _LARGE,
        "encode_layer": max((taken - few * sparse["float32"]) / _MANY, 1e-9),
        "compress_byte": compressing / plain,
    }


def _writing(place: Path, watch: _Watch) -> dict[str, object]:
    module, deltas = _deltas((_LARGE,) * _LARGE_LAYERS, _DENSE)
    settings = RecordingSettings(keep=_DENSE)
    store = DeltaStore.create(
        place / "store",
        signature=model_signature(module),
        settings=settings,
        data=DataFingerprint("position", 1),
        initial=clone_parameters(module),
    )
    arguments = {"optimizer": 0, "batch_size": 1, "seconds": 0.0}
    with store.writer(background=False) as writer:

        def append(ids: Sequence[int], with_deltas: bool) -> None:
            status = StepStatus.STORED if with_deltas else StepStatus.UNWATCHED
            given = deltas if with_deltas else None
            writer.append(sample_ids=ids, deltas=given, status=status, **arguments)  # type: ignore[arg-type]

        few = watch.seconds(lambda: append(range(1), False), times=100)
        many = watch.seconds(lambda: append(range(1025), False), times=100)
        writer.flush()
        file_seconds = watch.seconds(writer.flush, lambda: append(range(1), False))
        size = sum(path.stat().st_size for path in place.rglob("segment-*"))

        def append_some() -> None:
            for _ in range(4):
                append(range(1), True)

        full = watch.seconds(writer.flush, append_some, times=2)
    grown = (sum(path.stat().st_size for path in place.rglob("segment-*")) - size) / 3

    def state() -> None:
        weights_digest(module)
        parameter_norm(module)
        parameter_distance(module, store.initial_weights())

    return {
        "publish_byte": max((full - file_seconds) / grown, 1e-12),
        "publish_file": file_seconds,
        "state_entry": watch.seconds(state, times=2) / sum(layer.numel() for layer in module.layers),
        "sample": max((many - few) / 1024, 1e-9),
    }


def _step(place: Path, watch: _Watch) -> float:
    """What a step takes longer with a recorder where there is nothing to record: ids, hooks, and calls of Python."""
    steps = 50 + 20 * watch.repeats

    def seconds(callbacks: list[Callback]) -> float:
        clock = _Clock(watch.clock)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # what Lightning thinks of a loader without workers
            module = _OneLayer()
            trainer = idle_trainer(module)
            trainer.fit_loop.epoch_loop.max_steps = steps
            vars(trainer)["callbacks"] += [clock, *callbacks]
            trainer.fit(module, DataLoader(TensorDataset(torch.ones(steps, 2)), batch_size=1))
        return statistics.median(after - before for before, after in itertools.pairwise(clock.times))

    plain = seconds([])
    return max(seconds([DeltaRecorder(place / "steps", 1.0)]) - plain, 1e-9)
