"""Choosing settings, and methods, on validation data; needs the extra `tune`."""

from lightning_unlearn.tuning.objective import ErrorRates, Objective
from lightning_unlearn.tuning.plots import plot_pareto
from lightning_unlearn.tuning.result import TrialRecord, TuningResult
from lightning_unlearn.tuning.tune import tune

__all__ = ["ErrorRates", "Objective", "TrialRecord", "TuningResult", "plot_pareto", "tune"]
