"""`lightning-unlearn plan-recording`."""

from __future__ import annotations

import math
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from lightning_unlearn.callbacks.recording_settings import RequestedSettings
from lightning_unlearn.commands.shapes import frozen_but, read_shapes
from lightning_unlearn.deltas.recording_advice import human_bytes, recording_advice
from lightning_unlearn.deltas.recording_cost import RecordingCost, recording_cost, touched_share
from lightning_unlearn.deltas.recording_plan import PlannedRecording
from lightning_unlearn.deltas.recording_rates import DEFAULT_RATES
from lightning_unlearn.procedures.recording_rates import measure_rates
from lightning_unlearn.results import to_dict
from lightning_unlearn.types import ValueDtype
from lightning_unlearn.utilities.checks import check_positive_int, expected

__all__ = ["plan_recording_command"]

_OPTIMIZER_TENSORS = {"sgd": 0, "momentum": 1, "adam": 2}


def plan_recording_command(
    model: str,
    batch_size: int | None = None,
    steps: int | None = None,
    samples: int | None = None,
    epochs: int | None = None,
    model_args: dict[str, Any] | None = None,
    trainable: list[str] | str | None = None,
    keep: float | dict[str, float] | None = None,
    dtype: ValueDtype | None = None,
    compression: Literal["zstd"] | None = None,
    buffers: Literal["ignore", "record"] = "ignore",
    watched: float = 1.0,
    anchor_every: int | None = None,
    size_budget: float | None = None,
    key_bytes: int | None = None,
    optimizer: Literal["sgd", "momentum", "adam"] = "adam",
    checkpoints: int | None = None,
    ranks: int = 1,
    sharded: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    step_seconds: float | None = None,
    forget: int = 1,
    measure: bool = False,
    folder: Path | None = None,
    json: bool = False,
) -> None:
    """Say what recording a training will cost: bytes, seconds, memory, and what to set. Nothing is trained.

    Args:
        model: package.module:name of a class or factory, or the path of a checkpoint; no weights are made or read.
        batch_size: Samples behind an optimizer step, over all ranks and accumulated batches.
        steps: Optimizer steps; or give samples and epochs.
        samples: Samples of the training set.
        epochs: Passes over them.
        model_args: What the class or factory is called with.
        trainable: Patterns of names of the parameters that are trained, where not all that require gradients are.
        keep: Fraction of every layer to keep, or patterns and fractions, as for DeltaRecorder.
        dtype: How values are written, as for DeltaRecorder.
        compression: zstd, or none.
        buffers: Whether changes of float buffers are recorded.
        watched: Share of the steps whose delta is stored.
        anchor_every: Steps between two anchors.
        size_budget: Bytes that deltas may take.
        key_bytes: Mean length of sample keys, where ids are strings.
        optimizer: What an anchor keeps of it: nothing, one tensor or two for each parameter.
        checkpoints: How often weights are made known, by default once an epoch.
        ranks: Processes that train.
        sharded: Whether each rank holds a part of every layer (FSDP).
        device: Where the weights are. For cuda seconds rest on assumptions, which are printed.
        step_seconds: Seconds of a step without recording, for shares of it.
        forget: Samples that a request may name.
        measure: Measure how fast this machine is, in some seconds; of use only where the training will run.
        folder: A folder on the store's disk, for measuring.
        json: Print JSON instead of tables.
    """
    count = _steps(steps, samples, epochs, batch_size)
    signature, frozen = read_shapes(model, model_args)
    if trainable is not None:
        frozen = frozen_but(signature, [trainable] if isinstance(trainable, str) else trainable)
    requested = RequestedSettings.of(
        keep,
        dtype,
        scope="layer",
        criterion="magnitude",
        compression=compression,
        watched=watched < 1,
        buffers=buffers,
    )
    plan = PlannedRecording(
        signature,
        requested.base,
        steps=count,
        batch_size=check_positive_int("batch_size", batch_size),
        frozen=frozen,
        samples=samples,
        ranks=ranks,
        sharded=sharded,
        device=device,
        watched=watched,
        checkpoints=(epochs or 1) if checkpoints is None else checkpoints,
        anchor_every=anchor_every,
        optimizer_tensors=_OPTIMIZER_TENSORS[optimizer],
        key_bytes=key_bytes,
    )
    plan = replace(plan, settings=requested.resolve(plan.trainable_share))
    cost = recording_cost(plan, measure_rates(folder) if measure else DEFAULT_RATES)
    advice = recording_advice(cost, step_seconds=step_seconds, forget=forget, size_budget=size_budget)
    if json:
        print(dumps(_plain(cost, advice, step_seconds, forget), indent=1, allow_nan=False))
        return
    _print(cost, advice, step_seconds, forget, model, Console())


def _steps(steps: int | None, samples: int | None, epochs: int | None, batch_size: int | None) -> int:
    if batch_size is None:
        raise ValueError(expected("batch_size", "given", None, "It is the samples behind a step, over all ranks."))
    if steps is not None:
        if epochs is not None:
            raise ValueError(expected("steps", "left out where `epochs` says how long", steps))
        return check_positive_int("steps", steps)
    if samples is None or epochs is None:
        raise ValueError(expected("steps", "given, or else `samples` and `epochs`", None))
    each = math.ceil(check_positive_int("samples", samples) / check_positive_int("batch_size", batch_size))
    return each * check_positive_int("epochs", epochs)


def _touched(cost: RecordingCost, forget: int) -> float | None:
    per_epoch = cost.plan.steps_per_epoch
    return None if per_epoch is None else touched_share(per_epoch, forget)


def _plain(cost: RecordingCost, advice: tuple[str, ...], step_seconds: float | None, forget: int) -> dict[str, Any]:
    plan, slowest = cost.plan, cost.slowest
    memory = max(cost.memory, key=lambda one: one.host + one.device)
    content = {
        "parameters": sum(layer.numel for layer in plan.parameters),
        "trained": sum(layer.numel for layer in plan.trained),
        "layers": len(plan.trained),
        "steps": plan.steps,
        "stored_steps": plan.stored_steps,
        "settings": plan.settings,
        "kept": cost.kept,
        "bytes": {**to_dict(cost.bytes), "deltas": cost.bytes.deltas, "total": cost.bytes.total},
        "step_bytes": cost.step_bytes,
        "largest_rank_bytes": max(rank.total for rank in cost.ranks),
        "seconds": {**to_dict(slowest), "inline": slowest.inline, "threads": cost.beside},
        "share_of_step": None if step_seconds is None else cost.share_of(step_seconds),
        "memory": {**to_dict(memory), "start": cost.memory[0].start, "host": memory.host, "device": memory.device},
        "network_bytes": cost.network_bytes,
        "touched_share": _touched(cost, forget),
        "advice": advice,
        "assumptions": cost.assumptions,
    }
    return dict(to_dict(content))


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _rows(cost: RecordingCost, step_seconds: float | None, forget: int) -> list[tuple[str, str]]:
    plan, parts, slowest = cost.plan, cost.bytes, cost.slowest
    memory = max(cost.memory, key=lambda one: one.host + one.device)
    settings = plan.settings
    entries, trained = sum(layer.numel for layer in plan.parameters), sum(layer.numel for layer in plan.trained)
    keep = f"{settings.keep:g} of each layer" + (", with exceptions" if settings.keep_overrides else "")
    ranks = f"{plan.ranks} rank{'s' * (plan.ranks != 1)}{', sharded' * plan.sharded}"
    rows = [
        ("parameters", f"{entries:,}, {trained:,} of them trained, in {len(plan.trained)} layers"),
        ("recorded", f"{keep}, {settings.value_dtype}, {settings.compression or 'not compressed'}"),
        ("steps", f"{plan.steps:,}, {plan.stored_steps:,} of them with their delta, on {ranks}"),
        ("", ""),
        ("size of the store", human_bytes(parts.total)),
        ("  positions", human_bytes(parts.positions)),
        ("  values", human_bytes(parts.values)),
        ("  descriptions of layers", human_bytes(parts.entries)),
        ("  ids and their index", human_bytes(parts.ids)),
        ("  columns and documents", human_bytes(parts.columns)),
        ("  weights at the start", human_bytes(parts.initial)),
        ("  anchors", human_bytes(parts.anchors)),
        (
            "a step",
            f"{human_bytes(cost.step_bytes)}, {cost.step_bytes / max(1, cost.kept):.2f} bytes for each kept entry",
        ),
        ("largest rank", human_bytes(max(rank.total for rank in cost.ranks))),
        ("", ""),
        ("seconds of a step, inline", _seconds(slowest.inline)),
        ("  looking for edits", _seconds(slowest.watch)),
        ("  selecting", _seconds(slowest.select)),
        ("  reductions over shards", _seconds(slowest.network)),
        (f"  encoding{' (beside the training)' * slowest.encodes_beside}", _seconds(slowest.encode + slowest.compress)),
        ("  ids and hooks", _seconds(slowest.other)),
        ("writing, beside the training", _seconds(slowest.publish)),
        ("a checkpoint", _seconds(slowest.checkpoint)),
    ]
    if step_seconds is not None:
        rows.append(("share of a step", f"{cost.share_of(step_seconds):.2%} of {_seconds(step_seconds)}"))
    rows += [
        ("", ""),
        ("memory of the host, a rank", human_bytes(memory.host)),
        ("  of the first rank at a checkpoint", f"{human_bytes(cost.memory[0].start)} more"),
        ("memory of the device, a rank", human_bytes(memory.device)),
        ("network, a step and rank", human_bytes(cost.network_bytes)),
    ]
    touched = _touched(cost, forget)
    if touched is not None:
        rows.append((f"steps that {forget:,} sample{'s' * (forget != 1)} touch", f"{touched:.3%}"))
    return rows


def _print(
    cost: RecordingCost,
    advice: tuple[str, ...],
    step_seconds: float | None,
    forget: int,
    model: str,
    console: Console,
) -> None:
    table = Table(title=f"Recording {model}", title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("how much", overflow="fold")
    for label, value in _rows(cost, step_seconds, forget):
        if label:
            table.add_row(label, value)
        else:
            table.add_section()
    console.print(table)
    for heading, lines in (("What to set", advice), ("What this rests on", cost.assumptions)):
        console.print(f"{heading}:", highlight=False, markup=False)
        for line in lines:
            console.print(f"- {line}", highlight=False, markup=False)
