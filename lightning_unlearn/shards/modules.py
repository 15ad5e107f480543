"""What the trainings of SISA are made of: seeds, new modules, and their checkpoints in memory."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.fabric.plugins import CheckpointIO

from lightning_unlearn.exceptions import StoreMismatchError, UnsupportedStrategyError
from lightning_unlearn.shards.manifest import SisaManifest
from lightning_unlearn.utilities.batch_norm import tracking_layers
from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.modes import isolated_rng
from lightning_unlearn.utilities.parameters import model_signature
from lightning_unlearn.utilities.rng import seed_of
from lightning_unlearn.utilities.trainers import idle_trainer

__all__ = [
    "ModuleFactory",
    "built",
    "check_readable",
    "check_signature",
    "checkpoint_of",
    "needs_two_samples",
    "restored",
    "seeded",
    "signature_of",
    "untrained_checkpoint",
]

ModuleFactory: TypeAlias = Callable[[], LightningModule]
"""Builds an untrained module, with initial weights from the global random state, or the same ones each time."""

_SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


@contextmanager
def seeded(*parts: Any) -> Iterator[None]:
    """All random numbers inside come from these values; outside, the random state is what it was."""
    before = {name: os.environ.get(name) for name in _SEED_VARIABLES}
    try:
        with isolated_rng():
            seed_everything(seed_of(*parts), workers=True, verbose=False)
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def built(factory: ModuleFactory) -> LightningModule:
    """A module of a factory, its layers made.

    Raises:
        TypeError: it gives something else.
    """
    module = factory()
    if not isinstance(module, LightningModule):
        raise TypeError(expected("module_factory", "a function that builds a LightningModule", type(module)))
    module.configure_model()
    return module


def restored(factory: ModuleFactory, checkpoint: Mapping[str, Any]) -> LightningModule:
    """A new module with the state of a checkpoint."""
    module = built(factory)
    module.on_load_checkpoint(dict(checkpoint))
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    return module


def signature_of(factory: ModuleFactory) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """Names, shapes and dtypes of what a factory builds.

    Raises:
        ValueError: two modules share parameters, so that training one trains the other.
    """
    with seeded("signature"):
        first, second = built(factory), built(factory)
    shared = {id(one) for one in first.parameters()} & {id(one) for one in second.parameters()}
    if first is second or shared:
        rule, remedy = "a function that builds a new module each time", "Build the layers inside of it."
        raise ValueError(expected("module_factory", rule, "one whose modules share parameters", remedy))
    return tuple((layer.name, layer.shape, layer.dtype) for layer in model_signature(first).layers)


def check_signature(factory: ModuleFactory, manifest: SisaManifest) -> None:
    """Refuse a factory whose modules do not fit the folder's checkpoints.

    Raises:
        StoreMismatchError: names, shapes or dtypes differ.
    """
    found = signature_of(factory)
    if found != manifest.signature:
        differing: Sequence[Any] = sorted(set(found) ^ set(manifest.signature), key=str)
        rule, got = "a function that builds the module of the training", f"another one: {shorten(differing, 2)}"
        raise StoreMismatchError(expected("module_factory", rule, got))


class _Kept(CheckpointIO):
    """Takes a checkpoint in memory: on a disk it would outlive the sample it saw."""

    def __init__(self) -> None:
        self.content = b""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        stream = io.BytesIO()
        torch.save(checkpoint, stream)
        self.content = stream.getvalue()

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError

    def remove_checkpoint(self, path: Any) -> None:
        """Nothing is anywhere."""


def checkpoint_of(trainer: Trainer) -> bytes:
    """What `Trainer.save_checkpoint` writes: weights and hyper-parameters, no optimizer."""
    kept = _Kept()
    trainer.strategy.checkpoint_io = kept
    trainer.save_checkpoint("in-memory.ckpt", weights_only=True)
    return kept.content


def needs_two_samples(factory: ModuleFactory) -> bool:
    """Whether what a factory builds normalises by batches, which one sample alone does not make."""
    with seeded("batch"):
        return bool(tracking_layers(built(factory)))


def check_readable(factory: ModuleFactory, *, weights_only: bool) -> None:
    """Find out before the training, rather than after it, whether its checkpoints can be loaded.

    Raises:
        UnsupportedStrategyError: what `save_hyperparameters` or the module's hooks put there is refused.
    """
    with seeded("readable"):
        content = untrained_checkpoint(factory)
    try:
        torch.load(io.BytesIO(content), weights_only=weights_only)
    except pickle.UnpicklingError as error:
        rule = "a function that builds a module whose checkpoints hold tensors and plain values"
        got, remedy = str(error).splitlines()[0], "Pass weights_only=False, or leave such hyper-parameters out."
        raise UnsupportedStrategyError(expected("module_factory", rule, got, remedy)) from error


def untrained_checkpoint(factory: ModuleFactory) -> bytes:
    """As `checkpoint_of`, of a new module that no Trainer had."""
    module = built(factory)
    trainer: Trainer = idle_trainer(module)
    module.trainer = trainer
    return checkpoint_of(trainer)
