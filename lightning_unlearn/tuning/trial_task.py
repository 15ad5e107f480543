"""What one trial does: a pass with the settings in question, and the model's errors on what may be looked at."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lightning import LightningDataModule, LightningModule

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import MissingRequirementError, UnlearningWarning
from lightning_unlearn.methods.base import Requirement, UnlearningMethod
from lightning_unlearn.methods.loss_method import LossMethod
from lightning_unlearn.procedures.outputs import Adapter, collect_outputs
from lightning_unlearn.procedures.planning import available_requirements
from lightning_unlearn.procedures.run import run_pass
from lightning_unlearn.procedures.settings import BatchNormPolicy, PassSettings
from lightning_unlearn.procedures.trainers import TrainerArgument, TrainerSource
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.tuning.objective import ErrorRates
from lightning_unlearn.tuning.watching import PassWatch

__all__ = ["Outcome", "TrialTask"]

_WARNED: dict[Any, Any] = {}
"""What was warned of already: trials say the same things, and filters that show something once keep count here."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one trial.

    Attributes:
        rates: Errors of the resulting model, means over the repetitions; `None` where the model broke.
        seconds: Mean wall time of a pass.
        notes: What the passes said.
    """

    rates: ErrorRates | None
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrialTask:
    """What is the same for all trials of a study, in every worker.

    Attributes:
        model: The trained module; never changed.
        request: What to forget.
        data: The user's data without its test part (`without_test_data`).
        store: What was recorded, or its path.
        then: Repair chained after each pass.
        trainer: For stages that train.
        batch_norm: As in `unlearn`.
        seed: Of the passes.
        repeats: Passes a trial, with seeds of their own.
        sample_keys: As given to the recorder.
        adapter: `(module, batch) -> (logits, targets)`.
    """

    model: LightningModule = field(repr=False)
    request: DeletionRequest
    data: LightningDataModule = field(repr=False)
    store: str | None = None
    then: LossMethod | None = None
    trainer: TrainerArgument = None
    batch_norm: BatchNormPolicy = "reestimate"
    seed: int = 0
    repeats: int = 1
    sample_keys: Any = field(default=None, repr=False)
    adapter: Adapter | None = None

    @cached_property
    def split(self) -> UnlearningDataModule:
        """The data to look at, split by the request."""
        return self._split(self.seed)

    def available(self) -> set[Requirement]:
        """What is at hand for a method."""
        return available_requirements(self.split, None if self.store is None else DeltaStore.open(self.store))

    @cached_property
    def original_validation(self) -> float:
        """Validation error of the original model."""
        return self._error(self.model, "validation")

    def rates(self, module: LightningModule) -> ErrorRates:
        """Errors of a module."""
        forget, validation = self._error(module, "forget"), self._error(module, "validation")
        return ErrorRates(forget, validation, self.original_validation)

    def run(self, method: UnlearningMethod, look: Callable[[int, ErrorRates], None] | None = None) -> Outcome:
        """Run one trial.

        Args:
            method: With the settings in question.
            look: Called with percent of the first pass and the errors there; may raise what ends the trial.
        """
        found: list[ErrorRates] = []
        notes: dict[str, None] = {}
        started = time.perf_counter()
        measuring = 0.0
        for repetition in range(self.repeats):
            watched = look if repetition == 0 and self.then is None else None
            model, said = self._pass(method, self.seed + repetition, watched)
            notes.update(dict.fromkeys(said))
            if model is None:
                return Outcome(None, (time.perf_counter() - started) / (repetition + 1), tuple(notes))
            begun = time.perf_counter()
            found.append(self.rates(model))
            measuring += time.perf_counter() - begun
        rates = ErrorRates(
            statistics.fmean(one.forget for one in found),
            statistics.fmean(one.validation for one in found),
            self.original_validation,
        )
        return Outcome(rates, (time.perf_counter() - started - measuring) / self.repeats, tuple(notes))

    def _pass(
        self, method: UnlearningMethod, seed: int, look: Callable[[int, ErrorRates], None] | None
    ) -> tuple[LightningModule | None, list[str]]:
        """The resulting model, `None` where its weights or its loss broke, and what was said."""
        show = None if look is None else lambda percent, module: look(percent, self.rates(module))
        settings = PassSettings(
            batch_norm=self.batch_norm,
            seed=seed,
            record=False,
            probe_samples=0,  # the trial is judged by its errors; a rollback would hide what the settings do
            sample_keys=self.sample_keys,
            adapter=self.adapter,
        )
        store = None if self.store is None else DeltaStore.open(self.store)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UnlearningWarning)
            result = run_pass(
                self.model,
                self.request,
                method=method,
                data=self._split(seed),
                store=store,
                ledger=None if store is None else DeletionLedger.open(store),
                trainers=TrainerSource(self.trainer, [PassWatch(method, show)]),
                then=self.then,
                settings=settings,
            )
        said = [str(one.message) for one in caught if issubclass(one.category, UnlearningWarning)]
        for one in caught:
            if not issubclass(one.category, UnlearningWarning):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno, registry=_WARNED)
        return None if result.rolled_back else result.model, [*result.notes, *said]

    def _split(self, seed: int) -> UnlearningDataModule:
        return UnlearningDataModule(self.data, self.request.sample_ids, sample_keys=self.sample_keys, seed=seed)

    def _error(self, module: LightningModule, part: str) -> float:
        loader = self.split.forget_loader() if part == "forget" else self.split.val_loader()
        if loader is None:
            raise MissingRequirementError(f"Tuning needs {Requirement.VALIDATION_DATA.value}.")
        return 1.0 - float(collect_outputs(module, loader, adapter=self.adapter).correct.double().mean())
