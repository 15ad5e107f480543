"""What is known before a pass: what is at hand for a method, and what the request would do."""

from __future__ import annotations

import warnings

from lightning import LightningModule

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.plan import DeletionPlan
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import MissingRequirementError, StoreMismatchError, UnlearningWarning
from lightning_unlearn.methods.base import Requirement, UnlearningMethod, WeightEdit
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import DataFingerprint
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.parameters import weights_digest

__all__ = ["available_requirements", "check_same_data", "make_plan", "subtracts", "warn_of_plan"]


def available_requirements(data: UnlearningDataModule | None, store: DeltaStore | None) -> set[Requirement]:
    """What is at hand for a method."""
    present = set()
    if data is not None:
        present |= {Requirement.RETAIN_DATA, Requirement.FORGET_DATA}
        if data.has_validation:
            present.add(Requirement.VALIDATION_DATA)
    if store is not None:
        present |= {Requirement.DELTAS, Requirement.INITIAL_WEIGHTS}
        if store.settings.is_dense:
            present.add(Requirement.DENSE_DELTAS)
    return present


def subtracts(method: UnlearningMethod) -> bool:
    """Whether a method subtracts recorded deltas, which is what a plan predicts and judges."""
    return isinstance(method, WeightEdit) and Requirement.DELTAS in method.requires


def make_plan(
    request: DeletionRequest,
    model: LightningModule,
    method: UnlearningMethod,
    store: DeltaStore | None,
    ledger: DeletionLedger | None,
) -> DeletionPlan | None:
    """The plan for this method; `None` where there is no store to plan with."""
    if store is None:
        return None
    if isinstance(method, WeightEdit) and subtracts(method):
        return request.plan(store, model, scale=method.scale, keep=method.keep, ledger=ledger)
    # A method that subtracts nothing runs on weights the store does not know as well (EMA, a later unrecorded fit).
    if store.state_of(weights_digest(model)) is None:
        return None
    return request.plan(store, model, ledger=ledger)


def warn_of_plan(plan: DeletionPlan, *, repaired: bool) -> None:
    """Warn with `UnlearningWarning` of a plan that may be carried out and promises trouble.

    Plain SGD is always warned of. A plan that refuses has said so already, with an exception, before it was forced.

    Args:
        plan: The plan.
        repaired: Whether a repair follows, which is what a middling damage asks for.
    """
    damaging = plan.damage == "strong" or (plan.damage == "warn" and not repaired)
    if plan.plain_sgd or (not plan.refuses and (damaging or plan.specificity == "warn")):
        warnings.warn(plan.recommendation, UnlearningWarning, stacklevel=4)


def check_same_data(recorded: DataFingerprint, data: UnlearningDataModule, *, keyed: bool) -> None:
    """Refuse to split data by other ids than the store's: an integer key is a position as well, of somebody else.

    Positions in a dataset that is not the recorded one are refused, too; stable keys hold across datasets.

    Args:
        recorded: The store's fingerprint.
        data: The split data.
        keyed: Whether it is split by `sample_keys`.

    Raises:
        MissingRequirementError: the store does not identify samples by position, and there are no `sample_keys`.
        StoreMismatchError: the store identifies samples by position, and there are `sample_keys`, or the length of
            the dataset differs.
    """
    if recorded.identity != "position" and not keyed:
        rule = f"given for a store that identifies samples by {recorded.identity}"
        remedy = "Pass position -> recorded id, so that the data is split by the ids of the request."
        raise MissingRequirementError(expected("sample_keys", rule, None, remedy))
    if recorded.identity == "position" and keyed:
        rule, remedy = "None for a store that identifies samples by position", "Ask with positions, as recorded."
        raise StoreMismatchError(expected("sample_keys", rule, "keys", remedy))
    length = data.root_length
    if recorded.identity == "position" and recorded.length is not None and length != recorded.length:
        raise StoreMismatchError(
            expected(
                "data",
                f"the recorded dataset of {recorded.length} samples, whose positions the store holds",
                length,
                "Pass that dataset, or record with `sample_keys` so that ids survive changes of the data.",
            )
        )
