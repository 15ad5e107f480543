"""Going back to a checkpoint from before the forgotten samples were met, and training on from there without them."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningModule, seed_everything

from lightning_unlearn.exceptions import MissingRequirementError, StoreMismatchError
from lightning_unlearn.methods.base import Guarantee, Procedure, ProcedureContext, Requirement
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.replay import replayable_batches
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import ModelState, SampleId
from lightning_unlearn.utilities.checks import check_choice, expected
from lightning_unlearn.utilities.parameters import weights_digest

__all__ = ["Rewind", "RewindPlan", "plan_rewind"]

_RECORDER = "DeltaRecorder"


@dataclass(frozen=True, slots=True)
class RewindPlan:
    """Where a request would send the training back to, and what that saves against retraining.

    Attributes:
        checkpoint: The checkpoint to go on from.
        steps_before: Recorded steps in it, which need not be repeated.
        first_touched: The first recorded step that saw one of the samples.
        steps: Recorded steps in the weights.
        seconds_saved: What the steps in the checkpoint took when they were recorded.
    """

    checkpoint: str
    steps_before: int
    first_touched: int
    steps: int
    seconds_saved: float

    def __str__(self) -> str:
        share = self.steps_before / self.steps if self.steps else 0.0
        return (
            f"{self.checkpoint}: {self.steps_before:,} of {self.steps:,} steps ({share:.0%}, "
            f"{self.seconds_saved:,.1f} s) come before the first one touched, {self.first_touched:,}"
        )


@register
class Rewind(Procedure):
    r"""Resume the last of the user's own checkpoints that precedes the first touched step, without the samples.

    Guarantee: exact. No weight in that checkpoint has seen a forgotten sample, and nothing after it does either. Where
    the order of batches is fixed it is the twin that was trained without them from the start, bit for bit.

    Cost: what remains of the training; `plan_rewind` says beforehand how much is saved. Samples that were there from
    the first epoch on leave nothing to save.

    Fails: no checkpoint precedes the first touched step (a `MissingRequirementError` says which step that is; `Retrain`
    then costs the same). Checkpoints written in mid-epoch are passed over, because a Trainer cannot go on within an
    epoch whose batches are others.

    Args:
        checkpoints: Checkpoints of the recorded training, or folders of them; written with the `DeltaRecorder` in the
            Trainer, whose mark says how many steps they hold.
        order: `"same"`: the user's own batches without the samples, a twin wherever their order is fixed by a seed and
            the epoch. `"recorded"`: those in the store, a twin of any run.
        weights_only: As `Trainer.fit` and `torch.load` take it; `False` for checkpoints that hold other objects than
            tensors and plain values, if they are trusted.

    Source: ours; a checkpoint that precedes the data is the exact starting point of SISA's slices (Bourtoule et al.
    2021, arXiv 1912.03817).

    >>> Rewind(checkpoints=["epoch=3.ckpt"]).order
    'same'
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.DELTAS, Requirement.RETAIN_DATA})
    guarantee: ClassVar[Guarantee] = "exact"
    source: ClassVar[str] = "after the slices of Bourtoule et al. 2021, arXiv 1912.03817"

    def __init__(
        self,
        *,
        checkpoints: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] = (),
        order: Literal["same", "recorded"] = "same",
        weights_only: bool = True,
    ) -> None:
        given = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else list(checkpoints)
        self.checkpoints = tuple(os.fspath(one) for one in given)
        self.order = check_choice("order", order, ("same", "recorded"))
        self.weights_only = weights_only

    def missing(self, available: Iterable[Requirement]) -> list[Requirement]:
        """As the base, and checkpoints where none were given."""
        return [*super().missing(available), *([] if self.checkpoints else [Requirement.CHECKPOINTS])]

    def run(self, context: ProcedureContext) -> LightningModule:
        """Resume the checkpoint and return the module.

        Raises:
            MissingRequirementError: no checkpoint precedes the first touched step.
            StoreMismatchError: the store does not know the weights, or they rest on an edit.
        """
        store, data, module = context.store, context.data, context.module
        if store is None:
            raise MissingRequirementError(f"Rewind needs {Requirement.DELTAS.value}.")
        ids = data.sample_ids
        forget = {ids[place] for place in data.forget_positions.tolist()}
        plan = plan_rewind(store, module, forget, self.checkpoints, weights_only=self.weights_only)
        replay = {}
        if self.order == "recorded":
            replay = {"batches": replayable_batches(store, module, data, skip=plan.steps_before)}
        if context.seed is not None:
            seed_everything(context.seed, workers=True, verbose=False)
        trainer = context.make_trainer(leave_out=data.forget_positions, **replay)
        with warnings.catch_warnings():
            # The recorder of the training is not in this Trainer: a rewound run is another one.
            warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided")
            trainer.fit(module, datamodule=data.users_data, ckpt_path=plan.checkpoint, weights_only=self.weights_only)
        return module


def plan_rewind(
    store: DeltaStore,
    module: LightningModule,
    sample_ids: Collection[SampleId],
    checkpoints: Iterable[str | os.PathLike[str]],
    *,
    weights_only: bool = True,
) -> RewindPlan:
    """The best checkpoint to go back to; nothing is changed.

    Args:
        store: The recording.
        module: The trained module.
        sample_ids: What is to be forgotten.
        checkpoints: Checkpoints or folders of them.
        weights_only: As `torch.load` takes it.

    Raises:
        MissingRequirementError: none of them precedes the first touched step.
        StoreMismatchError: the store does not know the weights, or they rest on an edit.
    """
    state = store.shortest_state_of(weights_digest(module))
    if state is None or state.edits:
        got = "other weights" if state is None else "weights that rest on a subtraction"
        raise StoreMismatchError(expected("model", "the one that was recorded", got, "Use `Retrain`."))
    touched = store.steps_of(sample_ids, within=state.ranges).tolist()
    total = sum(stop - start for start, stop in state.ranges)
    first = min(touched, default=total)
    found = []
    for path in _files(checkpoints):
        mark = _recorded(path, store.store_id, weights_only)
        if mark is not None and _is_beginning(mark[0], state) and (not mark[0] or mark[0][-1][1] <= first):
            found.append((sum(stop - start for start, stop in mark[0]), mark[1], path, mark[0]))
    if not found:
        rule = f"one, written at the end of an epoch, that holds no step from {first} on"
        raise MissingRequirementError(expected("checkpoints", rule, "none", "Use `Retrain`: it costs the same."))
    before, _, path, ranges = max(found)
    return RewindPlan(path, before, first, total, store.seconds_of(ranges))


def _files(checkpoints: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    for one in checkpoints:
        path = Path(one)
        if path.is_dir():
            yield from sorted(glob.glob(str(path / "**" / "*.ckpt"), recursive=True))
        else:
            yield str(path)


def _recorded(path: str, store_id: str, weights_only: bool) -> tuple[tuple[tuple[int, int], ...], bool] | None:
    """Ranges of the steps in a checkpoint, and whether its epoch was over (or all but over, as at a validation).

    `None` where it is not of this store, or of the middle of an epoch.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    if not loops.get("epoch_loop.batch_progress", {}).get("is_last_batch", False):
        return None
    epochs = loops.get("epoch_progress", {}).get("current", {})
    is_over = epochs.get("processed") == epochs.get("ready")
    for name, state in checkpoint.get("callbacks", {}).items():
        if name.startswith(_RECORDER) and isinstance(state, Mapping) and state.get("store_id") == store_id:
            return tuple((int(start), int(stop)) for start, stop in state["ranges"]), is_over
    return None


def _is_beginning(ranges: tuple[tuple[int, int], ...], state: ModelState) -> bool:
    """Whether the steps of a checkpoint are the first ones of those in the weights."""
    steps: list[Any] = [step for start, stop in ranges for step in range(start, stop)]
    whole = [step for start, stop in state.ranges for step in range(start, stop)]
    return whole[: len(steps)] == steps
