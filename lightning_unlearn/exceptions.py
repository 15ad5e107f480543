"""The exceptions of the package: one tree, each leaf also the built-in it is a kind of."""

from collections.abc import Mapping

__all__ = [
    "DeletionRequestError",
    "LightningUnlearnError",
    "MissingDeltaError",
    "MissingRequirementError",
    "NoEffectWarning",
    "SealedDataError",
    "StoreCorruptedError",
    "StoreMismatchError",
    "TrainingFailedError",
    "UnlearningWarning",
    "UnsupportedStrategyError",
]


class LightningUnlearnError(Exception):
    """Base of every error that this package raises on purpose."""


class MissingDeltaError(LightningUnlearnError, LookupError):
    """A planned step has no delta in the store (not watched, over budget, purged, or recorded too sparsely)."""


class StoreMismatchError(LightningUnlearnError, ValueError):
    """The store belongs to another model, other data, another run or another format version."""


class StoreCorruptedError(LightningUnlearnError, OSError):
    """A file of the store is damaged; the message names the file, the steps lost and the command that repairs."""


class DeletionRequestError(LightningUnlearnError, ValueError):
    """The request cannot be met: empty, duplicate, unknown or already honoured ids, or a destructive plan."""


class MissingRequirementError(LightningUnlearnError, TypeError):
    """The method needs something that it was not given (a store, retain data, a factory, ...)."""


class SealedDataError(LightningUnlearnError, PermissionError):
    """Something asked for test data while hyper-parameters are chosen."""


class TrainingFailedError(LightningUnlearnError, RuntimeError):
    """Some of many trainings failed; the others are finished and kept.

    Attributes:
        failures: Key of a member -> what its training raised.
    """

    def __init__(self, message: str, failures: Mapping[str, BaseException] | None = None) -> None:
        super().__init__(message)
        self.failures = dict(failures or {})


class UnsupportedStrategyError(LightningUnlearnError, NotImplementedError):
    """This strategy, loader or kind of optimization cannot be handled correctly, so it is refused."""


class UnlearningWarning(UserWarning):
    """The result may not be what was hoped for: damage, missing specificity, leftovers."""


class NoEffectWarning(UnlearningWarning):
    """The forgetting pass changed nothing."""
