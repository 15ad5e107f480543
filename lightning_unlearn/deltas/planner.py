"""How a plan is made: recognise the weights, look the samples up, measure the change, judge it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from lightning_unlearn.deltas.accumulate import sum_size
from lightning_unlearn.deltas.judgement import (
    PlanThresholds,
    judge_damage,
    judge_placement,
    judge_specificity,
    recommend,
)
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.plan import DeletionPlan
from lightning_unlearn.deltas.requested import RequestedSamples
from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.functional.pruning import Keep
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import ModelState, SampleId, Scale, StepStatus
from lightning_unlearn.utilities.checks import check_choice, expected
from lightning_unlearn.utilities.parameters import weights_digest

__all__ = ["make_plan", "recognise"]

_EMPTY = np.empty(0, np.int64)


def make_plan(
    request: RequestedSamples,
    store: DeltaStore | None,
    model: nn.Module | None,
    scale: Scale,
    keep: Keep,
    ledger: DeletionLedger | None,
    thresholds: PlanThresholds,
) -> DeletionPlan:
    """Find out what a request comes to; see `DeletionRequest.plan`."""
    check_choice("scale", scale, ("step", "share"))
    if store is None:
        return _without_store(request, scale, keep)
    state = recognise(store, model)
    if ledger is None and state.edits:
        ledger = DeletionLedger.open(store)
    honoured = {} if ledger is None else ledger.honoured(request.sample_ids, state.edits)
    again = {} if ledger is None else ledger.relearned(honoured, state)
    honoured = {one: entry for one, entry in honoured.items() if one not in again}
    active = [one for one in request.sample_ids if one not in honoured]
    steps, counts = _counts(store, [one for one in active if one not in again], again, state)
    shares = counts / np.maximum(store.batch_sizes(steps), 1)
    amounts = _amounts(steps, shares if scale == "share" else np.ones(len(steps)), store, state)
    missing = {
        step: StepStatus(status)
        for step, status in zip(amounts, store.statuses(list(amounts)).tolist(), strict=True)
        if status != StepStatus.STORED
    }
    started = time.perf_counter()
    present = {step: amount for step, amount in amounts.items() if step not in missing}
    norm, changed = sum_size(store, present, keep=keep)
    seconds = time.perf_counter() - started
    touched = len(steps) / state.n_steps if state.n_steps else 0.0
    mean_share = float(shares.mean()) if len(steps) else 0.0
    plain_sgd = _plain_sgd(store, steps)
    placement = judge_placement(mean_share, thresholds)
    relative_norm = norm / state.travel if state.travel else (float("inf") if norm else 0.0)
    damage = judge_damage(relative_norm, plain_sgd, thresholds)
    specificity = judge_specificity(placement, touched, thresholds)
    lost = store.lost_ids(state.ranges)
    outside = store.edited_steps(state.ranges) + state.drifted
    subtracting = ("PartialAmnesiac", *(("Amnesiac",) if store.settings.is_dense else ()))
    return DeletionPlan(
        request=request,
        scale=scale,
        keep=keep,
        state=state,
        steps=steps,
        amounts=amounts,
        missing_steps=missing,
        lost_steps=lost,
        outside_edits=outside,
        unknown_ids=tuple(store.unseen(active, within=state.ranges)),
        honoured_ids=honoured,
        collateral_ids=frozenset(store.ids_in(steps.tolist()) - set(request.sample_ids)),
        touched_fraction=touched,
        mean_share=mean_share,
        relative_norm=relative_norm,
        relative_weight_norm=norm / state.norm if state.norm else (float("inf") if norm else 0.0),
        changed_weights=changed,
        weights=sum(layer.numel for layer in store.signature.layers if layer.kind == "parameter"),
        placement=placement,
        plain_sgd=plain_sgd,
        damage=damage,
        specificity=specificity,
        seconds_touched=store.seconds_of([(step, step + 1) for step in steps.tolist()]),
        estimated_seconds=seconds,
        retraining_seconds=store.seconds_of(state.ranges),
        recommendation=recommend(
            samples=len(active),
            steps=len(steps),
            all_steps=state.n_steps,
            relative_norm=relative_norm,
            mean_share=mean_share,
            damage=damage,
            specificity=specificity,
            plain_sgd=plain_sgd,
            missing=len(missing),
            lost=lost,
            outside=outside,
            retraining_seconds=store.seconds_of(state.ranges),
        ),
        remaining_methods=("FineTune", "Retrain", *(() if missing else subtracting)),
    )


def _without_store(request: RequestedSamples, scale: Scale, keep: Keep) -> DeletionPlan:
    return DeletionPlan(
        request=request,
        scale=scale,
        keep=keep,
        state=None,
        steps=_EMPTY,
        amounts={},
        missing_steps={},
        lost_steps=0,
        outside_edits=0,
        unknown_ids=(),
        honoured_ids={},
        collateral_ids=frozenset(),
        touched_fraction=0.0,
        mean_share=0.0,
        relative_norm=0.0,
        relative_weight_norm=0.0,
        changed_weights=0,
        weights=0,
        placement=None,
        plain_sgd=False,
        damage=None,
        specificity=None,
        seconds_touched=0.0,
        estimated_seconds=0.0,
        retraining_seconds=0.0,
        recommendation=(
            "There is no store of recorded deltas, so nothing can be subtracted and nothing predicted. `FineTune` "
            "on the retained data removes part of what was learnt; only `Retrain` is certain. Record the next "
            "training with `DeltaRecorder`."
        ),
        remaining_methods=("FineTune", "Retrain"),
    )


def recognise(store: DeltaStore, model: nn.Module | None) -> ModelState:
    """The recorded state of a model's weights; the latest one for `None`.

    Raises:
        StoreMismatchError: another model, or weights that the store does not know.
    """
    if model is None:
        return store.tip
    store.check_model(model)
    state = store.state_of(weights_digest(model))
    if state is None:
        raise StoreMismatchError(
            expected(
                "model",
                f"one with weights that the store {store.url} knows",
                "other weights",
                "Load a checkpoint written while recording, or the result of a pass with this store; averaged (EMA, "
                "SWA) or otherwise edited weights are not known.",
            )
        )
    return state


def _counts(
    store: DeltaStore,
    fresh: Sequence[SampleId],
    again: Mapping[SampleId, npt.NDArray[np.int64]],
    state: ModelState,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Touched steps and how often the ids occur in them; of ids that were learnt again only what came since."""
    steps, counts = store.counts_of(fresh, within=state.ranges)
    total = Counter(dict(zip(steps.tolist(), counts.tolist(), strict=True)))
    for sample_id, later in again.items():
        found = store.counts_of([sample_id], within=[(step, step + 1) for step in later.tolist()])
        total.update(dict(zip(*(column.tolist() for column in found), strict=True)))
    touched = sorted(total)
    return np.asarray(touched, np.int64), np.asarray([total[step] for step in touched], np.int64)


def _amounts(
    steps: npt.NDArray[np.int64], wanted: npt.NDArray[np.float64], store: DeltaStore, state: ModelState
) -> dict[int, float]:
    already = store.lineage.subtracted(state.edits)
    amounts = {
        step: min(want, 1.0 - already.get(step, 0.0))
        for step, want in zip(steps.tolist(), wanted.tolist(), strict=True)
    }
    return {step: amount for step, amount in amounts.items() if amount > 0.0}


def _plain_sgd(store: DeltaStore, steps: npt.NDArray[np.int64]) -> bool:
    runs = store.lineage.runs
    stops = [*(run.first for run in runs[1:]), store.n_steps]
    return any(
        any(optimizer.is_plain_sgd for optimizer in run.optimizers)
        and bool(((steps >= run.first) & (steps < stop)).any())
        for run, stop in zip(runs, stops, strict=False)
    )
