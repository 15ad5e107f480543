"""Twins: the same training twice, in lockstep, the second time without the forgotten samples."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unlearn.callbacks.lockstep import ForgottenUnit, Lockstep
from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.data.positions import SampleKeys
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import LightningUnlearnError, UnlearningWarning
from lightning_unlearn.functional.weight_distance import Weights, verification_error
from lightning_unlearn.procedures.guards import private_copy
from lightning_unlearn.procedures.trainers import TrainerArgument, TrainerSource, add_callbacks
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.modes import isolated_rng
from lightning_unlearn.utilities.parameters import tensors_digest
from lightning_unlearn.utilities.rng import seed_generators
from lightning_unlearn.utilities.trainers import private_callbacks

__all__ = ["TwinRole", "Twins", "train_twins"]

TwinRole: TypeAlias = Literal["original", "retrained"]
"""Which of the two trainings."""

ModuleSource: TypeAlias = LightningModule | Callable[[], LightningModule] | tuple[LightningModule, LightningModule]


@dataclass(frozen=True)
class Twins:
    """Two trainings that differ in the forgotten samples alone, where `paired` is true.

    Attributes:
        original: The model that saw all of the data.
        retrained: The model that did not see what was forgotten.
        initial_weights: Parameters and buffers of `original` before its first step, by name, on the CPU; those of
            `retrained` as well, where the twins are paired.
        paired: Whether nothing was found that makes them differ otherwise.
        reasons: Why they are no pair.
        original_steps: Optimizer steps of the first training.
        retrained_steps: Optimizer steps of the second; a batch of which nothing was left makes none.
        original_seconds: Wall time of the first training.
        retrained_seconds: Wall time of the second.
    """

    original: LightningModule
    retrained: LightningModule
    initial_weights: Mapping[str, Tensor]
    paired: bool
    reasons: tuple[str, ...]
    original_steps: int
    retrained_steps: int
    original_seconds: float
    retrained_seconds: float

    def verification_error(self, unlearned: Weights | None = None, *, relative: bool = False) -> float:
        """L2 distance of some weights to those of `retrained`; see `functional.weight_distance.verification_error`.

        Args:
            unlearned: The weights, by default those of `original`: the distance that unlearning starts from.
            relative: Divide by the distance that `retrained` travelled from the initial weights.

        Raises:
            ValueError: the weights are of another architecture, or `retrained` has not moved.
        """
        start = self.initial_weights if relative else None
        left = self.original if unlearned is None else unlearned
        return float(verification_error(left, self.retrained, relative_to=start))

    @torch.no_grad()
    def initial_module(self) -> LightningModule:
        """A new module with the initial weights, for what is measured from there (Thudi et al. 2021, section 4).

        Raises:
            UnsupportedStrategyError: the module cannot be copied.
        """
        module = private_copy(self.original)
        for name, tensor in _state(module).items():
            tensor.copy_(self.initial_weights[name])
        return module


def train_twins(
    module: ModuleSource,
    forget: DeletionRequest | Collection[SampleId],
    *,
    data: LightningDataModule | DataLoader[Any] | Mapping[str, DataLoader[Any]],
    trainer: TrainerArgument = None,
    unit: ForgottenUnit = "samples",
    seed: int = 0,
    sample_keys: SampleKeys | None = None,
    callbacks: Callable[[TwinRole], Sequence[Callback]] | None = None,
) -> Twins:
    """Train a model with all of the data and, in lockstep, one without the forgotten samples.

    Both start from the same weights and get the same order of data, the same augmentation and the same random state in
    every batch (`Lockstep`), so that their distance is what the samples did. Between trainings that do not share these
    it is mostly noise. The paper's pair (Thudi et al. 2021, arXiv 2109.13398: the second skips the batch that holds the
    sample) is `unit="batches"`; there every batch that is left is the original's to the bit, dropout masks included.
    With `unit="samples"` only the samples go, and a batch that lost one has another dropout mask.

    Guarantee: exact. On one CPU each model is, bit for bit, that of a plain loop with these seeds. On other devices
    the twins are as equal as the device's arithmetic is deterministic.

    What can be found to set them apart is: other initial weights, a batch that differs although nothing was left out of
    it, a second training that ended early. Then a warning is given, and `paired` is false. The second training ends
    with the batch that the first one ended with, whatever limits or callbacks had ended that. The random state of the
    caller, the module and the loaders are left as they were; of a loader with persistent workers these are not used.

    Args:
        module: An untrained module, which is copied for each training; or a function that builds one, called twice
            under the same seed; or two modules, which are copied.
        forget: Ids of the samples: positions in the underlying dataset, or keys with `sample_keys`.
        data: The user's datamodule, training loader, or `{"train": ..., "val": ...}` loaders.
        trainer: Arguments of `Trainer` with a length, or a function that builds a fresh one. Their callbacks are copied
            for each training, so those the user holds see nothing.
        unit: What is left out: the samples, or every batch that holds one.
        seed: Seed of everything that is drawn.
        sample_keys: Position in the underlying dataset -> stable key.
        callbacks: Role -> callbacks of that training, used as they are: a recorder for the original, say.

    Returns:
        Both models and what they started from.

    Raises:
        DeletionRequestError: empty, duplicate or unknown ids.
        MissingRequirementError: the Trainer's arguments give no length.
        UnsupportedStrategyError: as `Lockstep`; or a module or a callback of the Trainer's cannot be copied.
        LightningUnlearnError: a training made no step, or did not run to its end.
        TypeError: `module` is, or builds, no LightningModule.
        ValueError: one Trainer instance for two trainings, or two modules that share parameters.

    >>> class Line(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(2, 1)
    ...
    ...     def training_step(self, batch, batch_idx):
    ...         return self.layer(batch).square().mean()
    ...
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> loader = DataLoader(torch.ones(6, 2), batch_size=2, shuffle=True)
    >>> trainer = {"max_epochs": 2, "accelerator": "cpu"}
    >>> twins = train_twins(Line, [3], data=loader, trainer=trainer, unit="batches")
    >>> twins.paired, twins.original_steps, twins.retrained_steps
    (True, 6, 4)
    """
    ids = (forget if isinstance(forget, DeletionRequest) else DeletionRequest(forget)).sample_ids
    trainers = TrainerSource(trainer)
    trainers.check_stages(2)
    trainers.check_length("train_twins")
    with isolated_rng():
        seed_generators(seed, "fit")
        split = UnlearningDataModule(data, ids, sample_keys=sample_keys)
        _ = split.forget_positions  # unknown ids are refused before anything is trained
        first, second = _two_modules(module, seed)
        runs = _Runs(split.users_data, trainers, seed, callbacks)
        original = runs.fit("original", first, Lockstep(seed))
        if original.steps == 0:
            raise LightningUnlearnError(expected("trainer", "running at least one step", "zero steps", "Check it."))
        leaving_out = Lockstep(seed, ids, sample_keys=sample_keys, unit=unit, until=original.lockstep.last)
        retrained = runs.fit("retrained", second, leaving_out)
    reasons = _reasons(original, retrained)
    if reasons:
        text = f"These trainings are no pair, so their distance is mostly that of any two: {' '.join(reasons)}"
        warnings.warn(text, UnlearningWarning, stacklevel=2)
    return Twins(
        original=first,
        retrained=second,
        initial_weights=original.initial,
        paired=not reasons,
        reasons=reasons,
        original_steps=original.steps,
        retrained_steps=retrained.steps,
        original_seconds=original.seconds,
        retrained_seconds=retrained.seconds,
    )


@dataclass(frozen=True)
class _Run:
    """What one of the two trainings left behind beside its model."""

    lockstep: Lockstep
    initial: dict[str, Tensor]
    steps: int
    seconds: float


class _Start(Callback):
    """Keeps the weights that a training starts from, whoever made them by then."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = {name: tensor.detach().cpu().clone() for name, tensor in _state(pl_module).items()}


@dataclass(frozen=True)
class _Runs:
    """What both trainings are given."""

    data: LightningDataModule
    trainers: TrainerSource
    seed: int
    callbacks: Callable[[TwinRole], Sequence[Callback]] | None

    def fit(self, role: TwinRole, module: LightningModule, lockstep: Lockstep) -> _Run:
        start = _Start()
        given = [] if self.callbacks is None else list(self.callbacks(role))
        seed_generators(self.seed, "fit")
        trainer = self.trainers.make()
        private_callbacks(trainer)
        # Last, so that a step is seeded behind whatever another callback drew.
        add_callbacks(trainer, [*given, start, lockstep])
        attached = self.data.trainer
        started = time.perf_counter()
        try:
            trainer.fit(module, datamodule=self.data)
        finally:
            self.data.trainer = attached
        seconds = time.perf_counter() - started
        if not trainer.state.finished:
            rule = f"running to the end of the {role} training"
            raise LightningUnlearnError(expected("trainer", rule, f"{trainer.state.status}"))
        module.trainer = None  # a twin is a module, not the Trainer and the loaders of its training
        return _Run(lockstep, start.state, int(trainer.global_step), seconds)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _two_modules(source: Any, seed: int) -> tuple[LightningModule, LightningModule]:
    if isinstance(source, LightningModule):
        return private_copy(source), private_copy(source)
    if isinstance(source, Sequence):
        pair = list(source)
    elif callable(source):
        pair = []
        for _ in range(2):
            seed_generators(seed, "module")
            pair.append(source())
    else:
        pair = [source]
    if len(pair) != 2 or not all(isinstance(one, LightningModule) for one in pair):
        rule = "a LightningModule, a function that builds one, or two of them"
        raise TypeError(expected("module", rule, [type(one).__name__ for one in pair]))
    first, second = pair
    if first is second or isinstance(source, Sequence):
        return private_copy(first), private_copy(second)
    if {id(tensor) for tensor in _state(first).values()} & {id(tensor) for tensor in _state(second).values()}:
        rule, remedy = "a function whose modules share no weights", "Copy in it what it does not build."
        raise ValueError(expected("module", rule, "one whose second module holds weights of the first", remedy))
    return first, second


def _reasons(original: _Run, retrained: _Run) -> tuple[str, ...]:
    reasons = []
    names = original.initial.keys() | retrained.initial.keys()
    differing = sorted(name for name in names if _bits(original.initial, name) != _bits(retrained.initial, name))
    if differing:
        reasons.append(f"They started from other values of {shorten(differing)}.")
    before, after = original.lockstep.contents, retrained.lockstep.contents
    other = sorted(place for place in after if after[place] != before.get(place))
    if other:
        reasons.append(
            f"Batch {other[0][1]} of epoch {other[0][0]} was not the same, so something draws from a random generator "
            "of its own."
        )
    if not retrained.lockstep.complete:
        reasons.append(
            f"The second training ended after {retrained.lockstep.last} (epoch, batch) and the first went on to "
            f"{original.lockstep.last}."
        )
    return tuple(reasons)


def _bits(state: Mapping[str, Tensor], name: str) -> str | None:
    return tensors_digest({name: state[name]}) if name in state else None
