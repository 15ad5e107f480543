"""Optuna, where it is installed."""

from __future__ import annotations

from typing import Any

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.utilities.checks import expected

__all__ = ["load_optuna"]


def load_optuna() -> Any:
    """The package `optuna`, saying no more than warnings.

    Raises:
        MissingRequirementError: it is not installed.
    """
    try:
        import optuna  # an optional extra
        import optuna.storages.journal
    except ImportError as error:
        remedy = "Install it with `pip install lightning-unlearn[tune]`."
        raise MissingRequirementError(expected("optuna", "installed for tuning", str(error), remedy)) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
