"""Which recorded training some weights came from, where it is one that can be gone through again step by step."""

from __future__ import annotations

from lightning_unlearn.exceptions import StoreMismatchError, UnsupportedStrategyError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.lineage import Run
from lightning_unlearn.types import ModelState
from lightning_unlearn.utilities.checks import expected, shorten

__all__ = ["the_run"]


def the_run(store: DeltaStore, state: ModelState | None, n_batches: int) -> Run:
    """The one plain training of one process that led to a state.

    Args:
        store: The recording.
        state: What the weights were recognised as.
        n_batches: How many batches they were trained on.

    Raises:
        StoreMismatchError: several trainings or branches led to them, or something else than an optimizer moved them.
        UnsupportedStrategyError: several processes, optimizers, or batches behind a step.
    """
    remedy = "Use another method, such as `Retrain`."
    if store.world_size > 1:
        rule, got = "recorded by one process", f"{store.world_size}"
        raise UnsupportedStrategyError(expected("store", rule, got, remedy))
    if state is None or len(state.ranges) != 1 or state.ranges[0][0] != 0:
        got = "steps of several branches" if state else "unknown weights"
        raise StoreMismatchError(expected("model", "made by recorded steps from the first one on", got, remedy))
    runs = [run for run in store.lineage.runs if run.first < state.n_steps]
    if len(runs) != 1 or runs[0].kind != "fit":
        got = ", ".join(run.kind for run in runs)
        raise StoreMismatchError(expected("model", "made by a single training", got, remedy))
    if len(runs[0].optimizers) != 1:
        got = shorten(one.name for one in runs[0].optimizers)
        raise UnsupportedStrategyError(expected("store", "recorded with one optimizer", got, remedy))
    if state.n_steps != n_batches:
        rule, got = "recorded without accumulation of gradients", f"{n_batches} batches in {state.n_steps} steps"
        raise UnsupportedStrategyError(expected("store", rule, got, remedy))
    edited = store.edited_steps(state.ranges)
    if edited or state.drifted:
        rule, got = "moved by its optimizer alone", f"one with {edited + state.drifted} changes by something else"
        raise StoreMismatchError(expected("model", rule, got, remedy))
    return runs[0]
