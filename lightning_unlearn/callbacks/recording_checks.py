"""What a recording needs to be correct, checked before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any
from warnings import warn

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_unlearn.exceptions import (
    DeletionRequestError,
    StoreMismatchError,
    UnlearningWarning,
    UnsupportedStrategyError,
)
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import DataFingerprint, OptimizerInfo, RecordingSettings, SampleId
from lightning_unlearn.utilities.checks import expected, shorten

__all__ = [
    "NEW_STORE",
    "check_anchors",
    "check_data",
    "check_dtypes",
    "check_optimizers",
    "check_recording",
    "check_resumable",
    "check_strategy",
    "check_watch",
    "describe_optimizer",
    "warn_of_others",
]

NEW_STORE = "Record into a new directory."

_LATER = ("xla", "hpu")
"""Kinds of devices that collect operations and compute them together, so that reading a weight would cut a step."""


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies under which it is not known which process has which weights.

    Raises:
        UnsupportedStrategyError: neither a single device nor DDP nor FSDP, DDP that averages models now and then, or
            devices that compute whole graphs later (XLA, HPU).
    """
    _check_devices(strategy)
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDPStrategy | ModelParallelStrategy)
    if not known or isinstance(strategy, DeepSpeedStrategy):
        rule = "a single device, DDP, FSDP or ModelParallelStrategy"
        remedy = "Train with strategy='ddp', 'fsdp' or ModelParallelStrategy, or without the recorder."
        raise UnsupportedStrategyError(expected("strategy", rule, type(strategy).__name__, remedy))
    if getattr(strategy, "_model_averaging_period", None) is not None:
        remedy = "Every process must hold the same weights after every step."
        got = "model_averaging_period"
        raise UnsupportedStrategyError(expected("strategy", "DDP without averaging of models", got, remedy))


def _check_devices(strategy: Strategy) -> None:
    devices = [getattr(strategy, "_root_device", None), *(getattr(strategy, "parallel_devices", None) or ())]
    later = [device.type for device in devices if device is not None and device.type in _LATER]
    if later or isinstance(strategy, XLAStrategy | SingleDeviceXLAStrategy):
        rule = "one whose devices have made a step when its hooks are called: CPU, CUDA or MPS"
        got = f"{type(strategy).__name__} on {(later or ['xla'])[0]}"
        raise UnsupportedStrategyError(expected("strategy", rule, got, "Train there without the recorder."))


def check_anchors(anchor_every: int | None, sharded: bool) -> None:
    """Refuse anchors of a sharded training, whose optimizer states are in pieces.

    Raises:
        UnsupportedStrategyError: both are given.
    """
    if anchor_every is not None and sharded:
        rule, remedy = "None where parameters are sharded", "Use the Trainer's own (distributed) checkpoints instead."
        raise UnsupportedStrategyError(expected("anchor_every", rule, anchor_every, remedy))


def check_dtypes(parameters: Mapping[str, Tensor], trainable: Collection[str]) -> None:
    """Refuse parameters whose changes cannot be ordered by magnitude.

    Raises:
        UnsupportedStrategyError: a parameter that is trained is not real floating-point.
    """
    for name in parameters:
        if name in trainable and not parameters[name].is_floating_point():
            got = f"{parameters[name].dtype} ({name})"
            raise UnsupportedStrategyError(expected("parameters", "real floating-point numbers", got))


def check_resumable(foreign: bool) -> None:
    """Refuse to go on from a checkpoint that was not written while recording.

    Raises:
        StoreMismatchError: `foreign` says that it was not.
    """
    if foreign:
        remedy = "Steps before it are not in a store: resume without the recorder, or train from the start."
        raise StoreMismatchError(
            expected("ckpt_path", "a checkpoint written while recording", "one without a recording", remedy)
        )


def check_optimizers(optimizers: Sequence[Any]) -> None:
    """Refuse optimizers that do not tell when they have stepped.

    Raises:
        UnsupportedStrategyError: not a `torch.optim.Optimizer`, or a `ZeroRedundancyOptimizer` that updates within the
            backward pass.
    """
    for optimizer in optimizers:
        if not hasattr(optimizer, "register_step_post_hook"):
            got = type(optimizer).__name__
            raise UnsupportedStrategyError(expected("optimizer", "a torch.optim.Optimizer", got))
        if getattr(optimizer, "_overlap_with_ddp", False):
            rule, got = "one that updates in its step", f"{type(optimizer).__name__}(overlap_with_ddp=True)"
            remedy = "Leave out `overlap_with_ddp`: its updates happen within the backward pass, unseen."
            raise UnsupportedStrategyError(expected("optimizer", rule, got, remedy))


def warn_of_others(optimizers: Sequence[Optimizer], module: nn.Module) -> None:
    """Warn of parameters that an optimizer trains and the module does not have."""
    known = {id(parameter) for parameter in module.parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if any(id(parameter) not in known for group in groups for parameter in group["params"]):
        warn(
            "The optimizer also holds parameters that are not part of the module: they are not recorded, so what they "
            "learned cannot be forgotten by subtraction.",
            UnlearningWarning,
            stacklevel=3,
        )


def check_watch(watch: Collection[SampleId] | None, known: Collection[SampleId] | None) -> None:
    """Refuse watched ids that cannot occur.

    Raises:
        DeletionRequestError: some ids are not in the training data.

    >>> check_watch([1, 2], range(3))
    """
    unknown = [] if watch is None or known is None else sorted((i for i in watch if i not in known), key=str)
    if unknown:
        remedy = "Watch positions in the training data, or keys that `sample_keys` gives."
        raise DeletionRequestError(expected("watch", "ids of the training data", f"also {shorten(unknown)}", remedy))


def check_recording(store: DeltaStore, settings: RecordingSettings, data: DataFingerprint, world_size: int) -> None:
    """Refuse to mix what cannot be told apart later.

    Raises:
        StoreMismatchError: other settings, other data, or another number of processes than the store's.
    """
    for field in fields(RecordingSettings):
        ours, theirs = getattr(settings, field.name), getattr(store.settings, field.name)
        if field.name != "watched" and ours != theirs:
            rule = f"{theirs!r}, as in the store"
            raise StoreMismatchError(expected(field.name, rule, ours, f"Use the same setting, or: {NEW_STORE}"))
    check_data(store.data, data)
    if world_size not in (1, store.world_size):
        rule = f"{store.world_size}, as in the store, or 1"
        raise StoreMismatchError(expected("world_size", rule, world_size, f"Use as many devices, or: {NEW_STORE}"))


def check_data(recorded: DataFingerprint, data: DataFingerprint) -> None:
    """Raise where the ids of `data` do not mean what those of the recorded data mean.

    Positions need the same dataset. Stable keys and ids out of the batch hold for other rows, too; only a hash that
    the user supplied both times, and that differs, is against them.

    Raises:
        StoreMismatchError: another kind of identity, another length (for positions), or another hash.

    >>> check_data(DataFingerprint("key", 10), DataFingerprint("key", 9))
    """
    if recorded.identity != data.identity:
        rule = f"a recording that identifies samples by {recorded.identity}, as the store does"
        remedy = "Pass the same `sample_id` or `sample_keys` as before."
        raise StoreMismatchError(expected("sample_id", rule, data.identity, remedy))
    if recorded.identity == "position" and recorded.length != data.length:
        rule = f"the recorded dataset of {recorded.length} samples"
        remedy = "Positions mean nothing in another dataset: record into a new directory, and pass `sample_keys`."
        raise StoreMismatchError(expected("train_dataloader", rule, f"one of {data.length} samples", remedy))
    if recorded.digest is not None and data.digest is not None and recorded.digest != data.digest:
        rule = f"{recorded.digest!r}, that of the recorded data"
        raise StoreMismatchError(expected("data_digest", rule, data.digest, NEW_STORE))


def describe_optimizer(optimizer: Optimizer) -> OptimizerInfo:
    """Name, learning rate and momentum of the first parameter group.

    >>> import torch
    >>> describe_optimizer(torch.optim.SGD([torch.zeros(1)], lr=0.5, momentum=0.9))
    OptimizerInfo(name='SGD', lr=0.5, momentum=0.9)
    """
    group = optimizer.param_groups[0] if optimizer.param_groups else {}
    momentum = group.get("momentum")
    return OptimizerInfo(
        type(optimizer).__name__, float(group.get("lr", 0.0)), None if momentum is None else float(momentum)
    )
