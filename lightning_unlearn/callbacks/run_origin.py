"""How the weights a run begins with relate to its store, which is made where there is none."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_unlearn.callbacks.recording_checks import NEW_STORE, check_recording
from lightning_unlearn.callbacks.recording_settings import trainable_share
from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.functional.pruning import FEW_TRAINABLE
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import DataFingerprint, LayerPiece, RecordingSettings
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.parameters import signature_of, tensors_digest
from lightning_unlearn.utilities.whole_weights import WholeWeights

__all__ = ["RunOrigin", "open_or_create", "recorded_settings"]


@dataclass(frozen=True, slots=True)
class RunOrigin:
    """What the weights contain as the run begins, and where its steps go.

    Attributes:
        n_steps: How many recorded steps come before those of the run.
        ranges: Half-open ranges of the recorded steps that are in the weights.
        edits: Entries of the ledger that the weights rest on.
        pieces: The store's list of pieces, with those of this run.
        first_piece: Number of the first piece of this run.
    """

    n_steps: int
    ranges: tuple[tuple[int, int], ...]
    edits: tuple[str, ...]
    pieces: tuple[LayerPiece, ...] = ()
    first_piece: int = 0


def open_or_create(
    url: str | os.PathLike[str],
    weights: WholeWeights,
    settings: RecordingSettings,
    data: DataFingerprint,
    *,
    world_size: int,
    resume: Mapping[str, Any] | None,
    pieces: Sequence[LayerPiece] = (),
) -> RunOrigin:
    """Where a run stands in the store at `url`; an empty one that an earlier run left is replaced.

    Args:
        url: Where the store is.
        weights: Those of the module that is about to be trained, whole.
        settings: How to record.
        data: What the loaders deliver.
        world_size: Number of ranks.
        resume: `RecordingSession.state()` of the checkpoint that is being resumed.
        pieces: What the layers are cut into.

    Raises:
        StoreMismatchError: the store is of another model, other data, other settings or another run.
    """
    if not DeltaStore.exists(url):
        if resume is not None:
            got = f"the checkpoint of store {resume['store_id']}, and no store at {os.fspath(url)!r}"
            remedy = "Point the recorder to that store, or train from the start."
            raise StoreMismatchError(expected("ckpt_path", "a checkpoint of this recording", got, remedy))
        # `create` copies what it is given.
        initial, frozen = _initial_weights(weights)
        store = DeltaStore.create(
            url,
            signature=signature_of(weights.parameters, weights.buffers),
            settings=settings,
            data=data,
            initial=initial,
            frozen=frozen,
            world_size=world_size,
        )
        return _with_pieces(store, RunOrigin(0, (), ()), pieces)
    store = DeltaStore.open(url, check=False)
    if resume is None and _is_left_over(store, weights):
        store.discard_empty()
        return open_or_create(url, weights, settings, data, world_size=world_size, resume=None, pieces=pieces)
    store.refresh()
    store.check_signature(signature_of(weights.parameters, weights.buffers))
    check_recording(store, settings, data, world_size)
    origin = _continued(store, weights) if resume is None else _resumed(store, weights, resume)
    store.lineage.truncated(origin.n_steps)  # refuses what rests on dropped steps, before anything is written
    return _with_pieces(store, origin, pieces)


def _with_pieces(store: DeltaStore, origin: RunOrigin, pieces: Sequence[LayerPiece]) -> RunOrigin:
    first = store.add_pieces(pieces) if pieces else 0
    return replace(origin, pieces=store.pieces, first_piece=first)


def _initial_weights(weights: WholeWeights) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and float buffers whose values are stored, and parameters of which a digest is enough.

    Where few parameters are trained (adapters on a large model), the others would be most of the store, and are there
    anyhow as the base model.
    """
    few = trainable_share(weights.parameters, weights.trainable) < FEW_TRAINABLE
    frozen = {name: one for name, one in weights.parameters.items() if few and name not in weights.trainable}
    tensors = {**weights.parameters, **weights.buffers}
    return {name: tensor for name, tensor in tensors.items() if name not in frozen}, frozen


def recorded_settings(url: str | os.PathLike[str], weights: WholeWeights) -> RecordingSettings | None:
    """Settings of the store that a run with these weights would continue, `None` where it begins one.

    Raises:
        StoreCorruptedError: the store is damaged.
    """
    if not DeltaStore.exists(url):
        return None
    store = DeltaStore.open(url, check=False)
    return None if _is_left_over(store, weights) else store.settings


def _resumed(store: DeltaStore, weights: WholeWeights, resume: Mapping[str, Any]) -> RunOrigin:
    if resume["store_id"] != store.store_id:
        rule = f"a checkpoint of store {store.store_id}"
        remedy = "Point the recorder to the store that the checkpoint was recorded into."
        raise StoreMismatchError(expected("ckpt_path", rule, f"one of store {resume['store_id']}", remedy))
    digest = tensors_digest(weights.parameters)
    if digest != resume["digest"]:
        rule = "a checkpoint whose weights are those that were recorded"
        raise StoreMismatchError(expected("ckpt_path", rule, "changed weights", NEW_STORE))
    ranges = tuple((int(start), int(stop)) for start, stop in resume["ranges"])
    return RunOrigin(int(resume["n_steps"]), ranges, tuple(resume["edits"]))


def _is_left_over(store: DeltaStore, weights: WholeWeights) -> bool:
    """Whether the store is what a run left that failed before its first step, from other initial weights."""
    # Without locks nobody can tell a failed run from one that is about to publish its first steps.
    nothing = store.files.is_local and store.is_blank
    return nothing and (store.is_part or store.state_of(tensors_digest(weights.parameters)) is None)


def _continued(store: DeltaStore, weights: WholeWeights) -> RunOrigin:
    state = store.state_of(tensors_digest(weights.parameters))
    if state is None:
        rule = "weights that the store knows"
        remedy = (
            "Load its initial weights or those of a checkpoint written while recording, resume with "
            "`fit(ckpt_path=...)`, or record into a new directory."
        )
        raise StoreMismatchError(expected("model", rule, "others", remedy))
    # Steps that no known weights contain were left by a run that ended before its first checkpoint.
    return RunOrigin(store.lineage.n_steps, state.ranges, state.edits)
