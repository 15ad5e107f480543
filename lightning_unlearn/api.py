"""The two calls most users need: `unlearn` and `evaluate`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.deltas.store import DeltaStore
from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.methods.base import LossMethod, UnlearningMethod
from lightning_unlearn.methods.registry import get_method
from lightning_unlearn.procedures.evaluate import evaluate
from lightning_unlearn.procedures.guards import ProbeThresholds
from lightning_unlearn.procedures.outcome import UnlearningResult
from lightning_unlearn.procedures.run import BatchNormPolicy, PassSettings, run_pass
from lightning_unlearn.procedures.trainers import TrainerArgument, TrainerSource
from lightning_unlearn.types import DataFingerprint, SampleId
from lightning_unlearn.utilities.checks import expected

__all__ = ["evaluate", "unlearn"]


def unlearn(
    model: LightningModule,
    request: DeletionRequest | Collection[SampleId],
    *,
    method: UnlearningMethod | str,
    data: LightningDataModule | DataLoader[Any] | Mapping[str, DataLoader[Any]],
    store: DeltaStore | str | os.PathLike[str] | None = None,
    trainer: TrainerArgument = None,
    then: LossMethod | None = None,
    batch_norm: BatchNormPolicy = "reestimate",
    seed: int | None = None,
    force: bool = False,
    sample_keys: Sequence[SampleId] | Mapping[int, SampleId] | Callable[[int], SampleId] | None = None,
    sample_id: str | Callable[[Any], Sequence[SampleId]] | None = None,
    ledger_key: bytes | None = None,
    adapter: Callable[[LightningModule, Any], tuple[Tensor, Tensor]] | None = None,
    probe_samples: int = 1000,
    thresholds: ProbeThresholds | None = None,
) -> UnlearningResult:
    """Forget samples: plan, edit or train, re-estimate BatchNorm, repair, probe, and write the ledger.

    `model` itself is never changed; the result holds a new module of the user's class. Everything that can be refused
    is refused before a weight or a file changes. A probe on retain data before and after the pass warns when the model
    was damaged, and returns the original when it collapsed.

    Args:
        model: The trained module.
        request: Ids to forget: positions in the recorded dataset, or stable keys.
        method: A method or its name, such as `PartialAmnesiac()` or `"partial-amnesiac"`.
        data: The user's datamodule, training loader, or `{"train": ..., "test": ...}` loaders.
        store: What `DeltaRecorder` recorded, or its path; needed by delta-based methods.
        trainer: For stages that train: arguments of `Trainer`, a function that builds a fresh one, or one fresh
            Trainer (good for a single stage).
        then: Repair chained after the method, such as `FineTune(max_steps=50)`.
        batch_norm: What happens to running statistics after an edit: `"reestimate"` on retain data, `"keep"`, or
            `"subtract"` their recorded changes.
        seed: Seeds every stage that draws.
        force: Carry out a plan that refuses, and keep a model the probe calls collapsed.
        sample_keys: As given to the recorder.
        sample_id: As given to the recorder.
        ledger_key: Secret of the ledger's id hashes; by default a file beside the store.
        adapter: `(module, batch) -> (logits, targets)`, for the probe of modules whose batches are not `(x, y)`.
        probe_samples: Retain samples in a probe; 0 switches probe and rollback off.
        thresholds: When the probe warns and rolls back.

    Returns:
        The result: model, plan, ledger entry, stages with probes, notes and leftovers.

    Raises:
        DeletionRequestError: empty, duplicate, unknown or already honoured ids, or a plan that refuses.
        MissingRequirementError: the method needs what was not given.
        MissingDeltaError: a planned step has no delta in the store.
        StoreMismatchError: the store is of another model or other data.
        StoreCorruptedError: the store is damaged.
        ValueError: a Trainer that has already run, or an argument out of range.
    """
    if not isinstance(model, LightningModule):
        raise TypeError(expected("model", "a LightningModule", type(model), "Wrap the network in one."))
    chosen = method if isinstance(method, UnlearningMethod) else get_method(method)()
    if then is not None and not isinstance(then, LossMethod):
        raise TypeError(expected("then", "a method that trains, such as FineTune(max_steps=50)", then))
    settings = PassSettings(
        batch_norm=batch_norm,
        seed=seed,
        force=force,
        probe_samples=probe_samples,
        thresholds=thresholds or ProbeThresholds(),
        sample_id=sample_id,
        sample_keys=sample_keys,
        adapter=adapter,
    )
    wanted = request if isinstance(request, DeletionRequest) else DeletionRequest(request)
    opened = store if store is None or isinstance(store, DeltaStore) else DeltaStore.open(store)
    split = UnlearningDataModule(data, wanted.sample_ids, sample_keys=sample_keys, seed=seed)
    if opened is not None:
        check_same_data(opened.data, split)
    return run_pass(
        model,
        wanted,
        method=chosen,
        data=split,
        store=opened,
        ledger=None if opened is None else DeletionLedger.open(opened, key=ledger_key),
        trainers=TrainerSource(trainer),
        then=then,
        settings=settings,
    )


def check_same_data(recorded: DataFingerprint, data: UnlearningDataModule) -> None:
    """Refuse positions in a dataset that is not the recorded one; stable keys hold across datasets.

    Raises:
        StoreMismatchError: the length of the dataset differs and the store identifies samples by position.
    """
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
