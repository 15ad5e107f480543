"""What to set for a planned recording, in words: pure rules on its cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from lightning_unlearn.deltas.judgement import PlanThresholds
from lightning_unlearn.deltas.recording_cost import RecordingCost, touched_share
from lightning_unlearn.deltas.recording_plan import PlannedRecording
from lightning_unlearn.deltas.recording_size import recorded_bytes
from lightning_unlearn.functional.pruning import DEFAULT_KEEP
from lightning_unlearn.utilities.checks import check_positive, check_positive_int

__all__ = ["human_bytes", "recording_advice"]

_SAVING, _NOTABLE, _LARGE_MODEL = 0.25, 0.05, 10**9
_CHECKPOINTS = 100
_WATCHED = 0.1  # share of the steps that keep their delta, in the advice on `watch`
_UNEVEN = 1.5


def human_bytes(size: float) -> str:
    """Bytes as people read them, in powers of a thousand.

    >>> human_bytes(532), human_bytes(1_234_000), human_bytes(9.99e14)
    ('532 B', '1.23 MB', '999 TB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.4g} PB"


def recording_advice(
    cost: RecordingCost,
    *,
    step_seconds: float | None = None,
    forget: int | None = None,
    size_budget: float | None = None,
) -> tuple[str, ...]:
    """What the figures say about the settings, one sentence or two for each point.

    Heuristic: thresholds are those of `PlanThresholds` where they are about forgetting, and round numbers elsewhere.

    Args:
        cost: What the recording costs.
        step_seconds: Seconds of a step without recording.
        forget: Samples that a request may name, at places that nobody chose.
        size_budget: Bytes that the deltas may take.

    Raises:
        ValueError: an argument is out of range.
    """
    seconds = None if step_seconds is None else check_positive("step_seconds", step_seconds)
    budget = None if size_budget is None else check_positive("size_budget", size_budget)
    count = None if forget is None else check_positive_int("forget", forget)
    return (*_placement(cost.plan, count), *_size(cost, budget), *_settings(cost, seconds), *_time(cost, seconds))


def _placement(plan: PlannedRecording, forget: int | None) -> Iterator[str]:
    per_epoch = plan.steps_per_epoch
    if per_epoch is None:
        return
    if forget is not None:
        share, (note, most) = touched_share(per_epoch, forget), PlanThresholds().touched
        said = f"A request for {forget:,} scattered sample{'s' * (forget != 1)} touches {share:.2%} of all steps, and "
        said += f"is one in {plan.batch_size:,} of the samples behind each: "
        if share > most:
            said += (
                "subtraction is refused there. Put a subject's samples into the same batches (`SubjectGrouping`), "
                "train in shards (`SisaTraining`), or expect to fine-tune or retrain."
            )
        elif share > note:
            said += "most of what is subtracted was learnt from others. Use `SubjectGrouping`."
        else:
            said += "few steps, but nearly all of each was learnt from others. Use `SubjectGrouping` to be specific."
        yield said
    if plan.watched == 1.0 and per_epoch > 1:
        watchable = int(math.log(1 - _WATCHED) / math.log1p(-1 / per_epoch))
        yield (
            f"`watch=`: up to {watchable:,} scattered ids leave nine tenths of the steps without a delta; grouped "
            f"by batches, a tenth of all samples do."
        )


def _size(cost: RecordingCost, budget: float | None) -> Iterator[str]:
    plan, deltas = cost.plan, cost.bytes.deltas
    if budget is not None and deltas > budget:
        yield (
            f"`size_budget={budget:.0f}` is reached after {int(budget / deltas * plan.steps):,} of {plan.steps:,} "
            "steps: samples in later ones cannot be forgotten by subtraction."
        )
    checkpoints = deltas / cost.bytes.initial
    if budget is None and checkpoints > _CHECKPOINTS:
        yield (
            f"The deltas take as much as {checkpoints:,.0f} copies of the weights: set `size_budget`, so that a full "
            "disk is no surprise."
        )
    if plan.anchor_every is None and plan.steps_per_epoch is not None and not plan.sharded:
        anchored = replace(plan, anchor_every=max(1, round(plan.steps_per_epoch)))
        size = sum(one.anchors for one in recorded_bytes(anchored))
        if size:
            yield (
                f"`anchor_every={anchored.anchor_every}`, one for each epoch, would take {human_bytes(size)} and let "
                "`Rewind` forget exactly, by training again from the first epoch that saw the samples."
            )


def _settings(cost: RecordingCost, step_seconds: float | None) -> Iterator[str]:
    plan, settings = cost.plan, cost.plan.settings
    total = cost.bytes.deltas

    def saved(**changes: object) -> float:
        other = replace(plan, settings=replace(settings, **changes))  # type: ignore[arg-type]
        return 1 - sum(one.deltas for one in recorded_bytes(other)) / total

    if not plan.trains_little and settings.keep > DEFAULT_KEEP:
        yield f"`keep={DEFAULT_KEEP}`, the default, would take {saved(keep=DEFAULT_KEEP, keep_overrides={}):.0%} less."
    if not plan.trains_little and settings.value_dtype == "float32":
        yield f"`value_dtype='scaled_float16'` would take {saved(value_dtype='scaled_float16'):.0%} less."
    compressing = sum(size.plain for size in cost.step) / plan.ranks
    if settings.compression is None:
        saving = saved(compression="zstd")
        if saving >= _SAVING:
            yield (
                f"`compression='zstd'` would take {saving:.0%} less, for compressing {human_bytes(compressing)} in "
                "every step and rank."
            )
    elif step_seconds is not None and not cost.slowest.encodes_beside:
        share = cost.slowest.compress / step_seconds
        if share > _NOTABLE:
            yield f"zstd takes {share:.0%} of a step: leave it out where the disk has room."
    if plan.trainable_share == 1 and sum(layer.numel for layer in plan.trained) >= _LARGE_MODEL:
        yield (
            "With adapters such as LoRA only they are trained and recorded, whole and as float32: a small share of "
            "this, and the store need not hold the base model."
        )


def _time(cost: RecordingCost, step_seconds: float | None) -> Iterator[str]:
    plan = cost.plan
    entries = [sum(piece.numel for piece in pieces) for pieces in plan.pieces]
    if not plan.sharded and plan.ranks > 1 and max(entries) > _UNEVEN * sum(entries) / plan.ranks:
        largest = max(plan.trained, key=lambda layer: layer.numel)
        yield (
            f"Layers are shared out whole, and `{largest.name}` alone has {largest.numel / sum(entries):.0%} of the "
            f"entries: the busiest of the {plan.ranks} ranks sets the pace."
        )
    if cost.slowest.checkpoint > 1:
        yield (
            f"Making the weights known takes about {cost.slowest.checkpoint:.3g} s at the end of every epoch and at "
            "every checkpoint: write few of them."
        )
    if step_seconds is None:
        return
    share = cost.share_of(step_seconds)
    if share > _NOTABLE:
        yield (
            f"Recording takes {share:.0%} of a step: it is proportional to the weights, not to the batch, so larger "
            "batches or accumulated gradients make it cheap, and so does `watch`."
        )
    if cost.beside > step_seconds:
        yield (
            f"Threads work {cost.beside:.3g} s for each step of {step_seconds:.3g} s, and the training waits for them: "
            "keep less, or leave compression out."
        )
    rate = plan.watched * cost.step_bytes / step_seconds
    yield f"The disk has to take {human_bytes(rate)} a second from all ranks together, and as much in bursts of 64 MiB."
