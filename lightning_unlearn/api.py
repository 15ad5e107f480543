"""The two calls most users need: `unlearn` and `evaluate`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.data.sample_ids import SampleKeys
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods.base import UnlearningMethod
from lightning_unlearn.methods.config import as_method
from lightning_unlearn.methods.loss_method import LossMethod
from lightning_unlearn.procedures.evaluate import evaluate as evaluate_loaders
from lightning_unlearn.procedures.guards import ProbeThresholds
from lightning_unlearn.procedures.outcome import UnlearningResult
from lightning_unlearn.procedures.outputs import Adapter
from lightning_unlearn.procedures.planning import check_same_data
from lightning_unlearn.procedures.run import run_pass
from lightning_unlearn.procedures.settings import BatchNormPolicy, PassSettings
from lightning_unlearn.procedures.trainers import TrainerArgument, TrainerSource
from lightning_unlearn.results import EvaluationResult
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import SampleId, Split
from lightning_unlearn.utilities.checks import expected

__all__ = ["evaluate", "unlearn"]


def unlearn(
    model: LightningModule,
    request: DeletionRequest | Collection[SampleId],
    *,
    method: UnlearningMethod | str | os.PathLike[str],
    data: LightningDataModule | DataLoader[Any] | Mapping[str, DataLoader[Any]],
    store: DeltaStore | str | os.PathLike[str] | None = None,
    trainer: TrainerArgument = None,
    then: LossMethod | None = None,
    batch_norm: BatchNormPolicy = "reestimate",
    seed: int | None = None,
    record: bool = True,
    control_for: DeletionRequest | Collection[SampleId] | None = None,
    force: bool = False,
    sample_keys: SampleKeys | None = None,
    sample_id: str | Callable[[Any], Sequence[SampleId]] | None = None,
    ledger_key: bytes | None = None,
    adapter: Adapter | None = None,
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
        method: A method or its name, such as `PartialAmnesiac()` or `"partial-amnesiac"`, or the path of a file that
            describes one (see `load_method`); a string is a path if it ends in .yaml, .yml or .json.
        data: The user's datamodule, training loader, or `{"train": ..., "test": ...}` loaders.
        store: What `DeltaRecorder` recorded, or its path; needed by delta-based methods.
        trainer: For stages that train: arguments of `Trainer`, a function that builds a fresh one, or one fresh
            Trainer (good for a single stage).
        then: Repair chained after the method, such as `FineTune(max_steps=50)`.
        batch_norm: What happens to running statistics after an edit: `"reestimate"` on retain data, `"keep"`, or
            `"subtract"` their recorded changes.
        seed: Seeds every stage that draws.
        record: Write the ledger entry and record a repair. `False` only reads the store: for experiments, whose model
            will not be used.
        control_for: Makes this pass the placebo of that request: the steps of `request` (an innocent group, see
            `placebo_request`) are subtracted, while re-estimation and repair leave out that request's samples, as the
            real pass does; otherwise the repair would teach them again. Implies `record=False`.
        force: Carry out a plan that refuses, and keep a model the probe calls collapsed.
        sample_keys: As given to the recorder. Where it was given `sample_id`: position -> the id in the batch.
        sample_id: As given to the recorder.
        ledger_key: Secret of the ledger's id hashes; by default a file beside the store.
        adapter: A `BatchAdapter`, or `(module, batch) -> (logits, targets)`, where batches are of another kind: for the
            probe, and for methods that need logits or give a batch other labels.
        probe_samples: Retain samples in a probe; 0 switches probe and rollback off.
        thresholds: When the probe warns and rolls back.

    Returns:
        The result: model, plan, ledger entry, stages with probes, notes and leftovers.

    Raises:
        DeletionRequestError: empty, duplicate, unknown or already honoured ids, or a plan that refuses.
        MissingRequirementError: the method needs what was not given.
        MissingDeltaError: a planned step has no delta in the store.
        StoreMismatchError: the store is of another model or other data, or identifies samples by position while
            `sample_keys` are given.
        UnsupportedStrategyError: the module cannot be copied, or an edit would be recorded by several processes.
        StoreCorruptedError: the store is damaged.
        FileNotFoundError: `method` is the path of a file that is not there.
        ValueError: a Trainer that has already run, an argument out of range, or a file that describes no method.
    """
    if not isinstance(model, LightningModule):
        raise TypeError(expected("model", "a LightningModule", type(model), "Wrap the network in one."))
    chosen = as_method(method)
    if then is not None and not isinstance(then, LossMethod):
        raise TypeError(expected("then", "a method that trains, such as FineTune(max_steps=50)", then))
    settings = PassSettings(
        batch_norm=batch_norm,
        seed=seed,
        record=record and control_for is None,
        force=force,
        probe_samples=probe_samples,
        thresholds=thresholds or ProbeThresholds(),
        sample_id=sample_id,
        sample_keys=sample_keys,
        adapter=adapter,
    )
    wanted = _as_request(request)
    left_out = wanted if control_for is None else _as_request(control_for)
    opened = store if store is None or isinstance(store, DeltaStore) else DeltaStore.open(store)
    split = UnlearningDataModule(data, left_out.sample_ids, sample_keys=sample_keys, seed=seed)
    if opened is not None:
        check_same_data(opened.data, split, keyed=sample_keys is not None)
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


def evaluate(
    original: LightningModule,
    unlearned: LightningModule,
    request: DeletionRequest | Collection[SampleId] | None = None,
    *,
    data: LightningDataModule | DataLoader[Any] | Mapping[str, DataLoader[Any]],
    retrained: LightningModule | None = None,
    placebo: LightningModule | None = None,
    references: Sequence[LightningModule] = (),
    true_targets: Tensor | None = None,
    paired: bool = False,
    unlearning_seconds: float | None = None,
    retraining_seconds: float | None = None,
    store_bytes: int | None = None,
    sample_keys: SampleKeys | None = None,
    adapter: Adapter | None = None,
) -> EvaluationResult:
    """Compare an unlearned model with what it should be, and say in words what follows.

    First it is asked whether there was anything to forget; "forgotten" is said only if the model moved to the
    retrained one, unharmed, and clearly more than the placebo did. See `procedures.evaluate` for the rule.

    Args:
        original: The trained model that holds the samples.
        unlearned: The model after the forgetting pass.
        request: What was forgotten; splits `data`. Leave it out where `data` is split already.
        data: The user's datamodule (with test data), or loaders: `"train"` and `"test"` to be split by `request`, or
            `"forget"`, `"test"` and optionally `"retain"`.
        retrained: A model trained without the forgotten samples. Without one, held-out samples stand in for it.
        placebo: The original after the same pass for an innocent group (`placebo_request`).
        references: Further retrained models; they measure the noise between trainings.
        true_targets: True labels of the forget set, in ascending order of position, where its labels were wrong.
        paired: Whether `retrained` shares initial weights and order with `original` (`Retrain(order="same")`).
        unlearning_seconds: How long the pass took.
        retraining_seconds: How long retraining took.
        store_bytes: Size of the store.
        sample_keys: As given to the recorder.
        adapter: `(module, batch) -> (logits, targets)` for modules whose batches are not `(x, y)`.

    Returns:
        Values, the values they should have, and a verdict.

    Raises:
        MissingRequirementError: no held-out data, or an adapter is needed.
        DeletionRequestError: ids that are not in the data.
        ValueError: an argument does not fit the others.
    """
    return evaluate_loaders(
        original,
        unlearned,
        data=_split_loaders(data, request, sample_keys),
        retrained=retrained,
        placebo=placebo,
        references=references,
        true_targets=true_targets,
        paired=paired,
        unlearning_seconds=unlearning_seconds,
        retraining_seconds=retraining_seconds,
        store_bytes=store_bytes,
        adapter=adapter,
    )


def _as_request(ids: DeletionRequest | Collection[SampleId]) -> DeletionRequest:
    return ids if isinstance(ids, DeletionRequest) else DeletionRequest(ids)


def _split_loaders(
    data: LightningDataModule | DataLoader[Any] | Mapping[str, DataLoader[Any]],
    request: DeletionRequest | Collection[SampleId] | None,
    sample_keys: SampleKeys | None,
) -> dict[Split, DataLoader[Any]]:
    if request is None:
        if not isinstance(data, Mapping):
            remedy = "Pass the request, or loaders of 'forget', 'retain' and 'test'."
            raise MissingRequirementError(expected("request", "given where `data` is not split", None, remedy))
        return dict(data)  # type: ignore[return-value]  # unknown names are refused by the evaluation
    split = UnlearningDataModule(data, _as_request(request).sample_ids, sample_keys=sample_keys)
    test = split.test_loader() or split.val_loader()
    if test is None:
        remedy = "Forgotten samples are compared with samples that no training saw."
        raise MissingRequirementError(expected("data", "with test data", type(data).__name__, remedy))
    return {"forget": split.forget_loader(), "retain": split.retain_loader(), "test": test}
