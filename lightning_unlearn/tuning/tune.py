"""`tune`: the settings of a method, or the method, that reach a goal at a price, without a look at test data."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.data.sample_ids import SampleKeys
from lightning_unlearn.data.sealed import check_disjoint, without_test_data
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import UnlearningWarning, UnsupportedStrategyError
from lightning_unlearn.methods.loss_method import LossMethod
from lightning_unlearn.methods.search_space import SearchSpace
from lightning_unlearn.procedures.guards import private_copy
from lightning_unlearn.procedures.outputs import Adapter
from lightning_unlearn.procedures.planning import check_same_data
from lightning_unlearn.procedures.settings import BatchNormPolicy
from lightning_unlearn.procedures.trainers import TrainerArgument, TrainerSource
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.tuning.candidates import Candidates, Methods
from lightning_unlearn.tuning.objective import Goal, Objective
from lightning_unlearn.tuning.optional import load_optuna
from lightning_unlearn.tuning.result import TrialRecord, TuningResult, judged
from lightning_unlearn.tuning.trial_task import TrialTask
from lightning_unlearn.tuning.trials import Sampler
from lightning_unlearn.tuning.workers import StudySetup, work, work_together
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import check_choice, check_positive_int, expected

__all__ = ["tune"]


def tune(
    model: LightningModule,
    request: DeletionRequest | Collection[SampleId],
    *,
    methods: Methods,
    data: LightningDataModule | DataLoader[Any] | Mapping[str, DataLoader[Any]],
    objective: Objective | Goal,
    trials: int = 30,
    storage: str | os.PathLike[str] | None = None,
    workers: int = 1,
    spaces: Mapping[str, SearchSpace] | None = None,
    sampler: Sampler = "tpe",
    pruner: Any = "worst_quarter",
    store: DeltaStore | str | os.PathLike[str] | None = None,
    then: LossMethod | None = None,
    trainer: TrainerArgument = None,
    batch_norm: BatchNormPolicy = "reestimate",
    seed: int = 0,
    repeats: int = 1,
    sample_keys: SampleKeys | None = None,
    adapter: Adapter | None = None,
    on_trial: Callable[[], None] | None = None,
) -> TuningResult:
    """Choose a method's settings, or among several methods, by a goal and its price on validation data.

    Every trial is a forgetting pass on a copy of the model, with other settings; the first trial of each method has its
    defaults. What is looked at are the samples to forget and the validation data. Test data cannot be asked for while
    this runs, and validation data that share samples with the training or the test data are refused where their
    datasets tell. Nothing is recorded, and no ledger is written.

    Guarantee: heuristic. The chosen settings are the best of those tried, on the data they were tried on; what they do
    on others, measure on test data (`evaluate`).

    What is the paper's and what is ours: see `Objective`; the ranges in which settings are varied, and the search, are
    ours.

    Args:
        model: The trained module; never changed.
        request: Ids to forget.
        methods: One method or several, by name or as instances (whose other values stay), or label -> method. Each has
            to declare a `search_space`.
        data: The user's datamodule, or loaders with `"train"` and `"val"`.
        objective: What to minimise; the name of a goal takes its defaults.
        trials: How many settings are tried, defaults included; of a study that is gone on with, all together.
        storage: File of the study's journal. Where it exists, and is of the same study, its trials count and it goes
            on; more processes, on this machine or on others that share the directory, may work at it by making the
            same call. `None` keeps nothing.
        workers: Processes of this call. With more than one, model and data have to pickle, and a script calls this
            below `if __name__ == "__main__":`. Each worker has an equal share of the cores.
        spaces: Label -> what is varied, instead of what the method declares.
        sampler: `"tpe"` (Optuna's tree-structured Parzen estimator) learns from trials, `"random"` does not: its trials
            serve any lambda.
        pruner: `"worst_quarter"` ends a pass that is in the worst quarter of all at a quarter, half or three quarters
            of its way (Optuna's `PercentilePruner`); defaults are never ended. Or a pruner of Optuna's, or `None`.
        store: As in `unlearn`, for methods that need deltas.
        then: Repair chained after every pass; passes are not ended early then.
        trainer: As in `unlearn`, as arguments or a factory; one process.
        batch_norm: As in `unlearn`.
        seed: Of passes and candidates. One worker that is not interrupted draws the same candidates again.
        repeats: Passes a trial, with seeds of their own; their errors are averaged.
        sample_keys: As in `unlearn`.
        adapter: As in `unlearn`; has to give class numbers as targets.
        on_trial: Called after each trial, with one worker.

    Returns:
        All trials, the best, and what other prices would have chosen.

    Raises:
        MissingRequirementError: no validation data, Optuna is not installed, or a method needs what was not given.
        SealedDataError: a trial asked for test data.
        StoreMismatchError: `storage` is of another study.
        UnsupportedStrategyError: the Trainer has several processes, or the data cannot be split.
        ValueError: parts of the data share samples, or an argument is out of range.
        LightningUnlearnError: the defaults of a method fail with this.

    A trial that raises anything else is put down as failed, with a warning, unless its settings are the defaults.

    Source: validation-based tuning after Alon and Dar 2025, arXiv 2503.08633.
    """
    load_optuna()
    if isinstance(trainer, Trainer):
        raise ValueError(expected("trainer", "arguments or a factory, for every trial needs a fresh one", trainer))
    setup = StudySetup(
        task=TrialTask(
            model=private_copy(model),
            request=request if isinstance(request, DeletionRequest) else DeletionRequest(request),
            data=without_test_data(data),
            store=None if store is None else store.url if isinstance(store, DeltaStore) else os.fspath(store),
            then=then,
            trainer=trainer,
            batch_norm=batch_norm,
            seed=seed,
            repeats=check_positive_int("repeats", repeats),
            sample_keys=sample_keys,
            adapter=adapter,
        ),
        candidates=Candidates(methods, spaces),
        objective=objective if isinstance(objective, Objective) else Objective(objective),
        trials=check_positive_int("trials", trials),
        sampler=check_choice("sampler", sampler, ("tpe", "random")),
        pruner=pruner,
    )
    _check(setup, data)
    workers = check_positive_int("workers", workers)
    with tempfile.TemporaryDirectory(prefix="tuning-") as temporary:
        path = Path(temporary) / "journal" if storage is None else Path(storage)
        if workers == 1:
            work(setup, path, 0, on_trial)
        else:
            work_together(setup, path, workers)
        return _result(setup, path)


def _check(setup: StudySetup, data: Any) -> None:
    """Refuse what no trial could do, before the first."""
    task = setup.task
    if task.store is not None:
        check_same_data(DeltaStore.open(task.store).data, task.split, keyed=task.sample_keys is not None)
    processes = TrainerSource(task.trainer).make().world_size
    if processes > 1:
        rule, remedy = "of one process for a trial", "Run several workers instead: `workers=`, or more processes."
        raise UnsupportedStrategyError(expected("trainer", rule, f"{processes} processes", remedy))
    for candidate in setup.candidates.of.values():
        candidate.method.check_requirements(task.available())
    users = UnlearningDataModule(data, task.request.sample_ids, sample_keys=task.sample_keys)
    parts = {"retain": users.retain_loader(), "forget": users.forget_loader(), "val": users.val_loader()}
    try:
        parts["test"] = users.test_loader()
    except Exception as error:  # several loaders, files that are not there: tuning can do without, this check cannot
        text = (
            f"Whether validation data share samples with the test data was not checked: {type(error).__name__}: {error}"
        )
        warnings.warn(text, UnlearningWarning, stacklevel=3)
    check_disjoint(parts)
    _ = task.original_validation  # a batch that cannot be read, or no validation data, is an error of the call


def _result(setup: StudySetup, path: Path) -> TuningResult:
    records = setup.study(path).records()
    made = [
        TrialRecord(
            base=setup.candidates.of[record["label"]].method,
            goal_error=None,
            value=None,
            **record,
        )
        for record in records
    ]
    notes = []
    if len(made) < setup.trials:
        notes.append(
            f"{len(made)} of {setup.trials} trials have ended: the others are under way elsewhere, or nothing was left."
        )
    return TuningResult(setup.objective, judged(made, setup.objective), tuple(notes))
