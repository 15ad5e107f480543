"""One worker of a study, and several of them in processes of their own."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_unlearn.exceptions import SealedDataError, UnlearningWarning
from lightning_unlearn.procedures.worker_pool import worker_pool
from lightning_unlearn.store.documents import digest_of
from lightning_unlearn.tuning.candidates import Candidates
from lightning_unlearn.tuning.journal import TrialJournal
from lightning_unlearn.tuning.objective import ErrorRates, Objective
from lightning_unlearn.tuning.optional import load_optuna
from lightning_unlearn.tuning.trial_task import Outcome, TrialTask
from lightning_unlearn.tuning.trials import Claimed, Sampler, TrialStudy
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.parameters import weights_digest

__all__ = ["StudySetup", "work", "work_together"]


@dataclass(frozen=True)
class StudySetup:
    """Everything that a worker is told."""

    task: TrialTask
    candidates: Candidates
    objective: Objective
    trials: int
    sampler: Sampler
    pruner: Any = field(repr=False)

    def about(self) -> dict[str, Any]:
        """What a journal is of; ids of people are in it as a digest only."""
        task = self.task
        ids = sorted(f"{type(one).__name__}:{one}" for one in task.request.sample_ids)
        return {
            "objective": asdict(self.objective),
            "model": weights_digest(task.model),
            "request": digest_of("\n".join(ids).encode()),
            "then": repr(task.then),
            "batch_norm": task.batch_norm,
            "seed": task.seed,
            "repeats": task.repeats,
        }

    def study(self, path: Path, worker: int = 0) -> TrialStudy:
        """The study on a journal."""
        pruners = load_optuna().pruners
        pruner = self.pruner
        if pruner == "worst_quarter":
            pruner = pruners.PercentilePruner(75.0, n_startup_trials=8)
        return TrialStudy(
            TrialJournal(path),
            self.candidates,
            self.objective,
            about=self.about(),
            sampler=self.sampler,
            pruner=pruner,
            seed=self.task.seed,
            worker=worker,
        )


def work(setup: StudySetup, path: Path, worker: int, on_trial: Callable[[], None] | None = None) -> None:
    """Evaluate trials until there are enough."""
    study = setup.study(path, worker)
    with _quiet_trainers():
        while (claimed := study.claim(setup.trials)) is not None:
            _evaluate(setup, study, claimed)
            if on_trial is not None:
                on_trial()


@contextmanager
def _quiet_trainers() -> Iterator[None]:
    """Every Trainer announces its devices and its end; of hundreds of them nobody reads it."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logging.WARNING, logger.level))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _evaluate(setup: StudySetup, study: TrialStudy, claimed: Claimed) -> None:
    pruned = load_optuna().TrialPruned

    def look(percent: int, rates: ErrorRates) -> None:
        if study.look(claimed, percent, rates):
            raise pruned(f"It was ended after {percent} percent of the pass, among the worst quarter.")

    try:
        method = setup.candidates.of[claimed.label].varied(claimed.settings)
        outcome = setup.task.run(method, None if setup.pruner is None else look)
    except pruned as ended:
        outcome = Outcome(None, 0.0, (str(ended),))
    except BaseException as error:
        if claimed.is_default or isinstance(error, SealedDataError) or not isinstance(error, Exception):
            study.abandon(claimed)
            raise
        study.failed(claimed, error)
        text = f"Trial {claimed.trial.number} ({claimed.label}, {claimed.settings}) failed: {error}"
        warnings.warn(text, UnlearningWarning, stacklevel=2)
        return
    study.tell(claimed, outcome)


def work_together(setup: StudySetup, path: Path, workers: int) -> None:
    """Run several workers in processes of their own, until there are enough trials.

    Raises:
        ValueError: what they need does not pickle.
    """
    try:
        pickle.dumps(setup)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        rule, got = "something that pickles, for several workers", f"{type(error).__name__}: {error}"
        remedy = "Define its classes and functions in a module, or start this call in several processes yourself."
        raise ValueError(expected("model, data and trainer", rule, got, remedy)) from error
    with worker_pool(None, workers) as pool:
        futures = [pool.submit(work, setup, path, worker) for worker in range(workers)]
        for future in futures:
            future.result()
