"""Anchors: the whole state of a training at a step boundary, from which it can go on bit for bit.

An anchor is one safetensors file in the directory of its rank: parameters and real buffers, every optimizer's state,
and the states of the random number generators. Everything that is no tensor is JSON in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lightning_unlearn.exceptions import MissingDeltaError, StoreCorruptedError
from lightning_unlearn.store.commits import Commit, rank_directory
from lightning_unlearn.store.documents import FORMAT_VERSION, digest_of
from lightning_unlearn.store.segment import read_header
from lightning_unlearn.store.state_tree import flatten_state, unflatten_state, without_shared_memory
from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.file_views import DAMAGE
from lightning_unlearn.utilities.files import Files
from lightning_unlearn.utilities.rng import RngState

__all__ = ["Anchor", "AnchorContents", "anchor_steps", "build_anchor", "load_anchor", "parse_anchor"]

_RNG = ("python", "numpy", "torch", "cuda")


@dataclass(frozen=True, slots=True)
class Anchor:
    """The state of a training after its first `step` recorded steps.

    Attributes:
        step: Number of recorded steps that the weights contain.
        weights: Parameters and real buffers by name, on the CPU; `None` where another rank keeps them.
        optimizers: For every optimizer what its `load_state_dict` takes; `None` likewise.
        rng: The random number generators of the rank; `None` where they were not kept.
    """

    step: int
    weights: dict[str, Tensor] | None
    optimizers: list[dict[str, Any]] | None
    rng: RngState | None


@dataclass(frozen=True, slots=True)
class AnchorContents:
    """An anchor as the bytes of its file.

    Attributes:
        step: Number of steps that its weights contain.
        data: The file.
        digest: BLAKE2b of the file.
    """

    step: int
    data: bytes
    digest: str


def build_anchor(
    step: int,
    weights: Mapping[str, Tensor] | None,
    optimizers: Sequence[Mapping[str, Any]] | None,
    rng: RngState | None,
    *,
    store_id: str,
    rank: int,
) -> AnchorContents:
    """The file that holds a state; a copy of everything in it.

    Raises:
        TypeError: an optimizer's state holds something that is neither a tensor nor plain data.
    """
    tensors: dict[str, Tensor] = {}
    state = {
        "weights": None if weights is None else dict(weights),
        "optimizers": None if optimizers is None else list(optimizers),
        "rng": None if rng is None else {name: getattr(rng, name) for name in _RNG},
    }
    tree = {name: flatten_state(part, name, tensors) for name, part in state.items()}
    metadata = {
        "format": "lightning-unlearn/anchor",
        "version": str(FORMAT_VERSION),
        "store_id": store_id,
        "rank": str(rank),
        "step": str(step),
        "state": json.dumps(tree, separators=(",", ":"), allow_nan=False),
    }
    data = save_tensors(without_shared_memory(tensors), metadata)
    return AnchorContents(step, data, digest_of(data))


def parse_anchor(data: bytes, step: int, digest: str) -> Anchor:
    """The state behind the bytes of a file.

    Raises:
        ValueError: the file does not fit its checksum, or cannot be read.
    """
    if digest_of(data) != digest:
        raise ValueError("the anchor does not fit its checksum")
    try:
        header, _ = read_header(data)
        tree, tensors = json.loads(header["__metadata__"]["state"]), load_tensors(data)
        state = {name: unflatten_state(tree[name], tensors) for name in ("weights", "optimizers", "rng")}
    except (KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(expected("anchor", "one that can be read", repr(error))) from error
    rng = state["rng"]
    return Anchor(step, state["weights"], state["optimizers"], None if rng is None else RngState(**rng))


def anchor_steps(commits: Sequence[Commit], n_steps: int) -> list[int]:
    """Steps at which some rank has an anchor, ascending; those within the steps that every rank has."""
    return sorted({anchor.step for commit in commits for anchor in commit.anchors if anchor.step <= n_steps})


def load_anchor(files: Files, commits: Sequence[Commit], step: int, rank: int) -> Anchor:
    """The state after `step` steps: weights and optimizers of the rank, or else of the first one that kept them.

    Raises:
        MissingDeltaError: no rank has an anchor there.
        StoreCorruptedError: the anchor is damaged.
    """
    found: dict[int, Anchor] = {}
    for number, commit in enumerate(commits):
        for ref in commit.anchors:
            if ref.step != step or (number != rank and any(one.weights is not None for one in found.values())):
                continue
            name = f"{rank_directory(number)}/{ref.name}"
            try:
                found[number] = parse_anchor(files.read(name), step, ref.digest)
            except DAMAGE as error:
                remedy = "`DeltaStore.open(url, check=False).repair()` drops it."
                raise StoreCorruptedError(expected(name, "an intact anchor", str(error), remedy)) from error
    if not found:
        known = shorten(sorted({ref.step for commit in commits for ref in commit.anchors}))
        raise MissingDeltaError(expected("step", f"one with an anchor ({known or 'there are none'})", step))
    own = found.get(rank)
    if own is not None and own.weights is not None:
        return own
    kept = next((anchor for anchor in found.values() if anchor.weights is not None), None)
    if kept is None:
        return Anchor(step, None, None, None if own is None else own.rng)
    return Anchor(step, kept.weights, kept.optimizers, None if own is None else own.rng)
