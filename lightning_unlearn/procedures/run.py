"""One forgetting pass: plan, edit or train, re-estimate BatchNorm, repair, probe, and roll back what went wrong.

Everything that can be refused is refused before a weight, a store or a ledger changes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning import Callback, LightningModule, Trainer, seed_everything

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.callbacks.leave_out import LeaveOut
from lightning_unlearn.callbacks.recorded_order import RecordedOrder
from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.plan import DeletionPlan
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.deltas.withdraw import withdraw_pass
from lightning_unlearn.exceptions import (
    LightningUnlearnError,
    MissingRequirementError,
    UnlearningWarning,
    UnsupportedStrategyError,
)
from lightning_unlearn.methods.base import (
    EditContext,
    Procedure,
    ProcedureContext,
    Requirement,
    UnlearningMethod,
    WeightEdit,
)
from lightning_unlearn.methods.loss_method import LossMethod
from lightning_unlearn.modules.gradients import differentiable
from lightning_unlearn.modules.probe import reestimate
from lightning_unlearn.modules.unlearning_module import UnlearningModule
from lightning_unlearn.procedures.guards import (
    check_finite,
    damage_sentence,
    judge_probe,
    nonfinite_parameters,
    private_copy,
    warn_if_unchanged,
)
from lightning_unlearn.procedures.outcome import UnlearningResult, leftovers_of
from lightning_unlearn.procedures.planning import available_requirements, make_plan, subtracts, warn_of_plan
from lightning_unlearn.procedures.probes import probe
from lightning_unlearn.procedures.settings import PassSettings
from lightning_unlearn.procedures.sharded_fit import WholeAgain, check_unsharded_training, check_whole
from lightning_unlearn.procedures.stopping import PassStops, held_out_data
from lightning_unlearn.procedures.trainers import TrainerSource, add_callbacks, check_unmonitored
from lightning_unlearn.results import StageResult
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.batch_adapter import as_batch_adapter
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.distributed import process_rank
from lightning_unlearn.utilities.modes import preserved_modes
from lightning_unlearn.utilities.parameters import (
    apply_change,
    clone_parameters,
    float_buffers,
    parameter_distance,
    parameter_norm,
    weights_digest,
)
from lightning_unlearn.utilities.rng import RngState

__all__ = ["run_pass"]


def run_pass(
    model: LightningModule,
    request: DeletionRequest,
    *,
    method: UnlearningMethod,
    data: UnlearningDataModule,
    store: DeltaStore | None,
    ledger: DeletionLedger | None,
    trainers: TrainerSource,
    then: LossMethod | None,
    settings: PassSettings,
) -> UnlearningResult:
    """Run one pass on a copy of `model`; see `unlearn` for what the arguments mean and what is raised."""
    started = time.perf_counter()
    check_whole(model)
    if store is not None:
        store.refresh()  # others may have recorded since it was opened; what they wrote is not this pass's to take back
    if isinstance(method, WeightEdit) and settings.record and store is not None and process_rank() > 0:
        rule, remedy = "called by rank 0 alone for an edit that is recorded", "Call it after the distributed run."
        raise UnsupportedStrategyError(expected("unlearn", rule, f"a call by rank {process_rank()}", remedy))
    method.check_requirements(available_requirements(data, store))
    if then is not None:
        then.check_requirements(available_requirements(data, store))
    trainers.check_stages(int(not isinstance(method, WeightEdit)) + int(then is not None))
    if isinstance(method, Procedure) and not method.knows_length:
        trainers.check_length(method.name)
    if isinstance(method, LossMethod) or then is not None:
        trainers.check_callbacks()
    if store is not None:
        store.check_model(model)
    if settings.batch_norm == "subtract" and (store is None or store.settings.buffers != "record"):
        raise MissingRequirementError(
            expected("store", 'recorded with buffers="record" for batch_norm="subtract"', store and store.settings)
        )
    plan = make_plan(request, model, method, store, ledger)
    if plan is not None and subtracts(method):
        plan.check(settings.force)
        warn_of_plan(plan, repaired=then is not None)
    work = _Pass(private_copy(model), data, store, ledger, trainers, settings)
    try:
        for stage in (method, then):
            if isinstance(stage, LossMethod):
                UnlearningModule(work.module, stage).unwrap()  # what cannot be wrapped is refused before the edit
                held_out_data(stage, data)
        work.run(method, plan, then)
    except BaseException:
        # The caller gets no model, so the store must not speak of one.
        work.withdraw()
        raise
    if settings.probe_samples and not {"accuracy", "loss"} & set(work.before):
        work.notes.append(
            "The probe found neither an accuracy nor a loss to measure, so whether the pass damaged the model is not "
            "known: pass `adapter`."
        )
    verdict = judge_probe(work.before, work.after, settings.thresholds)
    broken = nonfinite_parameters(work.module)
    if broken:
        work.notes.append(f"Weights are not finite in {', '.join(broken[:5])}.")
    if broken or work.broken:
        verdict = "collapsed"
    rolled_back = verdict == "collapsed" and not settings.force
    if verdict != "fine":
        work.notes.append(damage_sentence(work.before, work.after, verdict, rolled_back))
        warnings.warn(work.notes[-1], UnlearningWarning, stacklevel=3)
    if rolled_back:
        work.withdraw()
    work.module.trainer = None  # the result is a module, not the Trainers, loaders and stores of its pass
    return UnlearningResult(
        model=private_copy(model) if rolled_back else work.module,
        candidate=work.module if rolled_back else None,
        method=method.name,
        settings=method.settings,
        plan=plan,
        entry_id=None if rolled_back else work.entry_id,
        stages=tuple(work.stages),
        seconds=time.perf_counter() - started,
        notes=tuple(work.notes),
        leftovers=leftovers_of(store, plan, None if rolled_back else work.entry_id),
    )


def _as_in_training(module: LightningModule) -> None:
    """A module that was put to `eval()` as a whole trains as in training; single layers in eval mode stay so."""
    if not module.training:
        module.train()


class _Pass:
    """The state of one running pass: a private copy of the model and what was done to it."""

    def __init__(
        self,
        module: LightningModule,
        data: UnlearningDataModule,
        store: DeltaStore | None,
        ledger: DeletionLedger | None,
        trainers: TrainerSource,
        settings: PassSettings,
    ) -> None:
        self.module = module
        self.data = data
        self.store = store
        self.ledger = ledger
        self.trainers = trainers
        self.settings = settings
        self.stages: list[StageResult] = []
        self.notes: list[str] = []
        self.entry_id: str | None = None
        self.broken = False
        self.steps_before = None if store is None else store.n_steps
        self.before = self._probe()
        self.after = self.before

    def run(self, method: UnlearningMethod, plan: DeletionPlan | None, then: LossMethod | None) -> None:
        if isinstance(method, WeightEdit):
            self._stage(method.name, lambda: self._edit(method, plan))
            if self.settings.batch_norm == "reestimate":
                self._stage("batch_norm", lambda: self._reestimate())
        elif isinstance(method, LossMethod):
            self._stage(method.name, lambda: self._train(method))
        elif isinstance(method, Procedure):
            self._stage(method.name, lambda: self._procedure(method))
        else:
            raise TypeError(expected("method", "a WeightEdit, LossMethod or Procedure", method))
        if then is not None:
            self._stage(then.name, lambda: self._train(then))

    def withdraw(self) -> None:
        """Take the pass out of the store: the model it made is not the one that is returned."""
        if self.store is not None and self.steps_before is not None and self.settings.record:
            withdraw_pass(self.store, entry_id=self.entry_id, n_steps=self.steps_before)

    def _probe(self) -> Mapping[str, float]:
        samples = self.settings.probe_samples
        return probe(self.module, self.data.retain_loader(), samples, self.settings.adapter) if samples else {}

    def _stage(self, name: str, work: Callable[[], int]) -> None:
        if self.settings.seed is not None:
            seed_everything(self.settings.seed, workers=True, verbose=False)
        before = clone_parameters(self.module)
        norm = parameter_norm(self.module)
        started = time.perf_counter()
        steps = work()
        seconds = time.perf_counter() - started
        change = parameter_distance(self.module, before) / norm if norm else 0.0
        previous, self.after = self.after, self._probe()
        self.stages.append(StageResult(name, seconds, steps, previous, self.after, change))

    def _edit(self, method: WeightEdit, plan: DeletionPlan | None) -> int:
        context = EditContext(self.module, plan, self.store, self.data, self.settings.seed)
        if method.requires & {Requirement.FORGET_DATA, Requirement.RETAIN_DATA}:
            with differentiable(self.module, self.settings.adapter) as (loss, outputs):
                change = method.compute_edit(replace(context, loss=loss, outputs=outputs))
        else:
            change = method.compute_edit(context)
        check_finite(change, method.name)
        digest = weights_digest(self.module)
        apply_change(self.module, change)
        if self.settings.batch_norm == "subtract" and self.store is not None and plan is not None:
            self._subtract_buffers(self.store, plan)
        unchanged = warn_if_unchanged(digest, weights_digest(self.module), method.name)
        if self.settings.record and self.ledger is not None and plan is not None and not unchanged:
            # An edit that subtracts no deltas has nothing that an undo could add back.
            amounts = plan.amounts if subtracts(method) else {}
            entry = self.ledger.record(plan, self.module, method=method.name, keep=method.keep, amounts=amounts)
            self.entry_id = entry.entry_id
        return 0

    def _subtract_buffers(self, store: DeltaStore, plan: DeletionPlan) -> None:
        change = accumulate(store, plan.amounts, kinds=("buffer",))
        apply_change(self.module, change, scale=-1.0)
        for name, buffer in float_buffers(self.module).items():
            if name.endswith("running_var"):
                buffer.clamp_(min=0.0)

    def _reestimate(self) -> int:
        if not reestimate(self.module, self.data.retain_loader()):
            self.notes.append("The module has no BatchNorm statistics to re-estimate.")
        return 0

    def _train(self, method: LossMethod) -> int:
        digest = weights_digest(self.module)
        wrapped = UnlearningModule(self.module, method, adapter=self.settings.adapter)
        limits: dict[str, Any] = {"max_steps": method.max_steps, "max_epochs": method.max_epochs}
        limits = {key: value for key, value in limits.items() if value is not None}
        if method.schedule is not None:
            limits["reload_dataloaders_every_n_epochs"] = 1
        stops = PassStops(method, self.data, as_batch_adapter(self.settings.adapter))
        self.notes += stops.notes
        trainer = self.trainers.make(**limits, limit_val_batches=0, num_sanity_val_steps=0)
        check_unmonitored(vars(trainer)["callbacks"])  # a factory's Trainer is seen here for the first time
        if trainer.world_size > 1 and self.entry_id is not None:
            # Every process runs the whole pass, and would write a ledger entry of its own.
            rule, got = "of one process after a recorded edit", f"one of {trainer.world_size}"
            raise UnsupportedStrategyError(expected("trainer", rule, got, "Repair with devices=1."))
        whole = WholeAgain(trainer, self.module)
        add_callbacks(trainer, [*stops.callbacks, *self._repair_recorder(method, trainer.world_size)])
        try:
            with warnings.catch_warnings():
                # Validation is switched off on purpose; that its loader or its step is missing is no news.
                warnings.filterwarnings("ignore", message=r"You defined a `validation_step` but have no")
                warnings.filterwarnings("ignore", message=r"You passed in a `val_dataloader` but have no")
                with preserved_modes(self.module):
                    _as_in_training(self.module)
                    trainer.fit(wrapped, datamodule=self.data.with_parts(method.parts, method.schedule))
            steps = int(trainer.global_step)
            trained = whole.model_of(wrapped)
        finally:
            wrapped.unwrap()
        self.module = trained
        self.notes += [*stops.reasons(), *method.remarks()]
        self.broken |= stops.broken
        if steps == 0 and not stops.ended_early:
            raise LightningUnlearnError(
                expected("trainer", f"running at least one step of {method.name}", "zero steps", "Check its limits.")
            )
        warn_if_unchanged(digest, weights_digest(self.module), method.name)
        return steps

    def _procedure(self, method: Procedure) -> int:
        before = weights_digest(self.module)
        trainers: list[Trainer] = []

        def make(
            *,
            leave_out: Collection[int] | None = None,
            batches: Sequence[Sequence[int]] | None = None,
            random_states: Callable[[int], RngState | None] | None = None,
            **overrides: Any,
        ) -> Trainer:
            arranging: list[Callback] = []
            if batches is not None:
                arranging.append(RecordedOrder(batches, () if leave_out is None else leave_out, random_states))
            elif leave_out is not None:
                arranging.append(LeaveOut(leave_out))
            trainers.append(self.trainers.make(callbacks=arranging, **overrides))
            check_unsharded_training(trainers[-1].strategy, method.name)
            return trainers[-1]

        _as_in_training(self.module)
        self.module = method.run(ProcedureContext(self.module, self.data, make, self.store, self.settings.seed))
        warn_if_unchanged(before, weights_digest(self.module), method.name)
        return sum(int(trainer.global_step) for trainer in trainers)

    def _repair_recorder(self, method: LossMethod, world_size: int) -> list[Callback]:
        """Record training steps of a pass as well: the retain samples in them may be asked for next."""
        store = self.store
        if store is None or not self.settings.record:
            return []
        store.refresh()  # the ledger and an earlier stage write through objects of their own
        if store.state_of(weights_digest(self.module)) is None:
            return []
        identity = store.data.identity
        # Keys that only split the data are not a second identity for batches that name their samples themselves.
        name = {"key": "sample_keys", "batch": "sample_id"}.get(identity)
        identified = {name: getattr(self.settings, name)} if name else {}
        problem = None
        if not method.recordable:
            problem = f"{method.name} changes weights outside its optimizer steps as well"
        elif method.stop is not None and (method.check_every or 1) > 1:
            problem = "with `check_every` above 1 several steps may be taken back at once, which no record can say"
        elif None in identified.values():
            problem = f"the store identifies samples by {identity}, so pass the recorder's `{name}` to `unlearn`"
        elif world_size not in (1, store.world_size):
            problem = f"the store was recorded by {store.world_size} processes, and this Trainer has {world_size}"
        if problem is None:
            return [DeltaRecorder.like(store, kind="repair", **identified)]
        self.notes.append(f"The repair was not recorded: {problem}. Later requests will not recognise these weights.")
        warnings.warn(self.notes[-1], UnlearningWarning, stacklevel=2)
        return []
