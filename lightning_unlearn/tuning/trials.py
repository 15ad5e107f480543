"""The trials of a study in Optuna's journal: who may try what next, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from filelock import FileLock

from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.tuning.candidates import Candidates
from lightning_unlearn.tuning.journal import TrialJournal
from lightning_unlearn.tuning.objective import ErrorRates, Objective
from lightning_unlearn.tuning.optional import load_optuna
from lightning_unlearn.tuning.trial_task import Outcome
from lightning_unlearn.utilities.checks import expected

__all__ = ["Claimed", "Sampler", "TrialStudy"]

Sampler: TypeAlias = Literal["tpe", "random"]

_STUDY = "unlearning"
_DEFAULT, _REPLACES, _SAME, _RATES, _SECONDS, _NOTES, _ATTEMPT = (
    "default", "replaces", "same_as", "rates", "seconds", "notes", "attempt",
)  # fmt: skip
_ATTEMPTS = 3
"""Times that a trial is begun which ends its process: somebody may have killed it, or it may need too much memory."""
_FRUITLESS = 50
"""Suggestions in a row that were all tried before, after which a space counts as exhausted."""


@dataclass(frozen=True)
class Claimed:
    """A trial that this process alone evaluates.

    Attributes:
        trial: Optuna's.
        label: Of the method.
        settings: What is varied.
        is_default: Whether they are the method's defaults.
        lock: Held until it is told.
    """

    trial: Any
    label: str
    settings: Mapping[str, Any]
    is_default: bool
    lock: FileLock


class TrialStudy:
    """A study that several processes may work at, and that goes on where it was left.

    No settings are evaluated twice: a suggestion that was tried before, or is being tried, is put aside. A trial
    whose process died is begun again with the same settings.

    Args:
        journal: Where the trials are kept.
        candidates: What is tried.
        objective: What is minimised.
        about: Plain data about model, request and passes. A journal of anything else is refused.
        sampler: `"tpe"`, Optuna's tree-structured Parzen estimator, or `"random"`.
        pruner: Optuna's pruner, `None` for none.
        seed: Of the sampler.
        worker: Number of this worker, so that each draws other candidates.

    Raises:
        StoreMismatchError: the journal is of another study.
    """

    def __init__(
        self,
        journal: TrialJournal,
        candidates: Candidates,
        objective: Objective,
        *,
        about: Mapping[str, Any],
        sampler: Sampler = "tpe",
        pruner: Any = None,
        seed: int = 0,
        worker: int = 0,
    ) -> None:
        self._optuna = load_optuna()
        self._journal, self._candidates, self._objective = journal, candidates, objective
        self._sampler, self._seed, self._worker = sampler, seed, worker
        self._states = self._optuna.trial.TrialState
        with journal.deciding():
            self._study = self._optuna.create_study(
                study_name=_STUDY,
                storage=journal.storage(),
                pruner=pruner or self._optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
            self._begin(about)

    def _begin(self, about: Mapping[str, Any]) -> None:
        """Say in a new journal what it is about, with the defaults as first trials; compare with an old one."""
        wanted = json.loads(json.dumps({**about, "methods": self._candidates.signature()}))
        known = self._study.user_attrs.get("about")
        if known is None:
            for label, candidate in self._candidates.of.items():
                parameters = self._candidates.parameters(label, candidate.defaults)
                self._study.enqueue_trial(parameters, user_attrs={_DEFAULT: True}, skip_if_exists=True)
            self._study.set_user_attr("about", wanted)
        elif known != wanted:
            names = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
            rule, remedy = f"of a study with the same {', '.join(names)}", "Name another journal as `storage`."
            got = "; ".join(f"{name}: {known.get(name)!r} there, {wanted.get(name)!r} here" for name in names)
            raise StoreMismatchError(expected("storage", rule, got[:500], remedy))

    def claim(self, budget: int) -> Claimed | None:
        """The next trial for this process, or `None` when as many as `budget` have been begun or nothing is left."""
        with self._journal.deciding():
            self._release_dead()
            for _ in range(_FRUITLESS):
                trials = self._study.get_trials(deepcopy=False)
                counted = self._budgeted(trials)
                waiting = any(trial.state == self._states.WAITING for trial in trials)
                if not waiting and len(counted) >= budget:
                    return None
                self._reseed(len(trials))
                trial = self._study.ask()
                label, settings = self._candidates.suggested(trial)
                known = [one for one in counted if one.number != trial.number and one.params == trial.params]
                if known:
                    trial.set_user_attr(_SAME, known[0].number)
                    self._study.tell(trial, state=self._states.FAIL)
                    continue
                lock = self._journal.claim(trial.number)
                if lock is None:
                    raise RuntimeError(f"trial {trial.number} is new, and somebody has claimed it")
                return Claimed(trial, label, settings, bool(trial.user_attrs.get(_DEFAULT)), lock)
        return None

    def look(self, claimed: Claimed, percent: int, rates: ErrorRates) -> bool:
        """Put down how a trial is doing; whether it should be ended."""
        claimed.trial.report(self._objective.value(rates), percent)
        return bool(claimed.trial.should_prune()) and not claimed.is_default

    def tell(self, claimed: Claimed, outcome: Outcome) -> None:
        """Put down what became of a trial: its value, or that the model broke, or that it was ended."""
        trial = claimed.trial
        trial.set_user_attr(_SECONDS, outcome.seconds)
        trial.set_user_attr(_NOTES, list(outcome.notes))
        rates = outcome.rates
        if rates is None:
            self._study.tell(trial, state=self._states.PRUNED)
        else:
            trial.set_user_attr(_RATES, [rates.forget, rates.validation, rates.original_validation])
            self._study.tell(trial, self._objective.value(rates))
        self._journal.release(trial.number, claimed.lock)

    def failed(self, claimed: Claimed, error: BaseException) -> None:
        """Put down that a trial raised."""
        claimed.trial.set_user_attr(_NOTES, [f"{type(error).__name__}: {error}"])
        self._study.tell(claimed.trial, state=self._states.FAIL)
        self._journal.release(claimed.trial.number, claimed.lock)

    def abandon(self, claimed: Claimed) -> None:
        """Give a trial back untold: whoever goes on with the study begins it again."""
        claimed.lock.release()

    def records(self) -> list[dict[str, Any]]:
        """All trials that were told, in their order, in plain data."""
        found = []
        for trial in self._budgeted(self._study.get_trials(deepcopy=False)):
            read = self._candidates.read(trial.params)
            if not trial.state.is_finished() or read is None:
                continue
            label, settings = read
            rates = trial.user_attrs.get(_RATES)
            found.append(
                {
                    "number": trial.number,
                    "label": label,
                    "settings": settings,
                    "status": {"COMPLETE": "complete", "PRUNED": "ended", "FAIL": "failed"}[trial.state.name],
                    "rates": None if rates is None else ErrorRates(*rates),
                    "seconds": trial.user_attrs.get(_SECONDS),
                    "is_default": bool(trial.user_attrs.get(_DEFAULT)),
                    "notes": tuple(trial.user_attrs.get(_NOTES, ("its process ended before it did",))),
                }
            )
        return found

    def _budgeted(self, trials: list[Any]) -> list[Any]:
        """Trials that count: not those whose settings were tried before, nor those that another one replaces."""
        replaced = {trial.user_attrs.get(_REPLACES) for trial in trials}
        return [trial for trial in trials if trial.number not in replaced and _SAME not in trial.user_attrs]

    def _release_dead(self) -> None:
        """Trials that no living process is at are begun again, as new ones with the same settings."""
        for trial in self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            lock = self._journal.claim(trial.number)
            if lock is None:
                continue
            trials = self._study.get_trials(deepcopy=False)
            # It may have been told between the look and the claim.
            if trials[trial.number].state == self._states.RUNNING:
                attempt = int(trial.user_attrs.get(_ATTEMPT, 1))
                replaced = any(other.user_attrs.get(_REPLACES) == trial.number for other in trials)
                if (attempt < _ATTEMPTS or trial.user_attrs.get(_DEFAULT)) and not replaced:
                    attributes = {_REPLACES: trial.number, _ATTEMPT: attempt + 1}
                    attributes |= {_DEFAULT: True} if trial.user_attrs.get(_DEFAULT) else {}
                    self._study.enqueue_trial(dict(trial.params), user_attrs=attributes)
                self._study.tell(trial.number, state=self._states.FAIL)
            self._journal.release(trial.number, lock)

    def _reseed(self, trials: int) -> None:
        """A sampler whose draws depend on where the study is: resumed with the same seed it would draw the same."""
        seed = int(np.random.SeedSequence([self._seed, self._worker, trials]).generate_state(1)[0])
        samplers = self._optuna.samplers
        kind = samplers.RandomSampler if self._sampler == "random" else samplers.TPESampler
        self._study.sampler = kind(seed=seed)
