"""What tuning returns: every trial, the chosen one, and what another price would have chosen."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.methods.base import UnlearningMethod
from lightning_unlearn.methods.config import save_method
from lightning_unlearn.tuning.objective import ErrorRates, Objective
from lightning_unlearn.utilities.checks import expected

__all__ = ["TrialRecord", "TrialStatus", "TuningResult"]

TrialStatus: TypeAlias = Literal["complete", "ended", "failed"]
"""`"ended"`: without hope on the way, or the model broke; `"failed"`: raised an error."""


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: In the journal; the defaults of the first method are 0.
        label: Of the method.
        base: The method with its defaults.
        settings: What was varied.
        status: See `TrialStatus`.
        rates: Errors of the resulting model, `None` where the trial did not end.
        goal_error: How far the goal was missed, `None` without rates.
        value: What is minimised, `None` without rates.
        seconds: Wall time of a pass.
        is_default: Whether these are the method's defaults.
        notes: What the pass said, or the error.
    """

    number: int
    label: str
    base: UnlearningMethod = field(repr=False)
    settings: Mapping[str, Any]
    status: TrialStatus
    rates: ErrorRates | None
    goal_error: float | None
    value: float | None
    seconds: float | None
    is_default: bool
    notes: tuple[str, ...] = field(default=(), repr=False)

    @property
    def method(self) -> UnlearningMethod:
        """The method with the settings that were tried.

        Raises:
            ValueError: it does not take them, which is why the trial failed.
        """
        return self.base.with_hyperparameters(**self.settings)

    @property
    def validation_error(self) -> float | None:
        """Share of wrong answers on validation data."""
        return None if self.rates is None else self.rates.validation

    @property
    def forget_error(self) -> float | None:
        """Share of wrong answers on the forgotten samples, against the labels they were trained with."""
        return None if self.rates is None else self.rates.forget


@dataclass(frozen=True, slots=True)
class TuningResult:
    """What came of a study.

    The values are of validation data and of the forget set, and the best of many is better there than it will be
    elsewhere: report what the chosen settings do on test data.

    Attributes:
        objective: What was minimised.
        trials: All that were told, in their order.
        notes: What a reader should know.

    >>> from lightning_unlearn.methods import FineTune
    >>> def trial(number, forget, validation):
    ...     rates = ErrorRates(forget, validation, original_validation=0.1)
    ...     return TrialRecord(number, "FineTune", FineTune(), {}, "complete", rates, None, None, 1.0, number == 0)
    >>> objective = Objective("bias_removal", lambda_=0.5)
    >>> result = TuningResult(objective, judged([trial(0, 0.5, 0.1), trial(1, 0.75, 0.25)], objective))
    >>> result.best.number, result.best.value, result.chosen(Objective("bias_removal", lambda_=0.2)).number
    (1, 0.25, 0)
    """

    objective: Objective
    trials: tuple[TrialRecord, ...] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> TrialRecord:
        """The trial with the smallest value; of equal ones the smaller validation error, then the earlier, wins.

        Raises:
            LightningUnlearnError: no trial came to its end.
        """
        return self.chosen(self.objective)

    @property
    def default(self) -> TrialRecord:
        """The first method's defaults.

        Raises:
            LightningUnlearnError: another process is still at them.
        """
        for trial in self.trials:
            if trial.is_default:
                return trial
        raise LightningUnlearnError(expected("trials", "some with defaults", "none", "Wait for the other processes."))

    def chosen(self, objective: Objective, label: str | None = None) -> TrialRecord:
        """What another objective, such as another lambda, would choose from the same trials.

        Where trials were drawn at random this is as good as a study of its own; otherwise they were drawn for the
        objective of the study.

        Args:
            objective: What to minimise.
            label: Only trials of this method.

        Raises:
            LightningUnlearnError: no trial came to its end.
        """
        ended = [(trial, trial.rates) for trial in self.trials if trial.rates is not None]
        ended = [(trial, rates) for trial, rates in ended if label in (None, trial.label)]
        if not ended:
            raise LightningUnlearnError(expected("trials", "some that came to their end", self.reasons(), "See why."))
        return min(ended, key=lambda one: (objective.value(one[1]), one[1].validation, one[0].number))[0]

    def pareto_front(self) -> list[TrialRecord]:
        """Trials that no other one beats in both goal error and validation error, by goal error."""
        ended = [(trial.goal_error, trial.rates.validation, trial) for trial in self.trials if trial.rates is not None]
        front: list[TrialRecord] = []
        for _, validation, trial in sorted(ended, key=lambda one: (one[0], one[1], one[2].number)):
            if not front or validation < (front[-1].validation_error or 0.0):
                front.append(trial)
        return front

    def reasons(self) -> list[str]:
        """Why trials did not come to their end."""
        return sorted({note for trial in self.trials if trial.rates is None for note in trial.notes})

    def with_objective(self, objective: Objective) -> TuningResult:
        """The same trials, judged by another objective."""
        return replace(self, objective=objective, trials=judged(self.trials, objective))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the best trial's method as a file that `unlearn(method=path)` takes.

        Raises:
            LightningUnlearnError: no trial came to its end.
            ValueError: the method holds an object, such as a factory, that no file can say.
        """
        best, objective = self.best, self.objective
        comment = (
            f"Chosen among {len(self.trials)} trials for {objective.goal} with lambda {objective.lambda_:g}:\n"
            f"goal error {best.goal_error:.4g}, validation error {best.validation_error:.4g}.\n"
            "Test data were not looked at."
        )
        save_method(best.method, path, comment=comment)


def judged(trials: Iterable[TrialRecord], objective: Objective) -> tuple[TrialRecord, ...]:
    """Trials with the goal error and the value that an objective gives them."""
    return tuple(
        trial
        if trial.rates is None
        else replace(trial, goal_error=objective.goal_error(trial.rates), value=objective.value(trial.rates))
        for trial in trials
    )
