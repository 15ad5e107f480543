"""Weights that are kept somewhere already: read by name from a store, a checkpoint or a mapping."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.checks import expected

__all__ = ["WeightSource", "read_weights"]

WeightSource: TypeAlias = str | os.PathLike[str] | DeltaStore | Mapping[str, Tensor]
"""A checkpoint, a store (its initial weights), or weights by name."""


def read_weights(source: WeightSource) -> Mapping[str, Tensor]:
    """The weights that `source` holds, by name, on the CPU; files are mapped rather than copied where they can be.

    Args:
        source: Weights by name; a `DeltaStore` or its URL, whose initial weights are meant; or a local file: a
            checkpoint of Lightning's, a saved `state_dict()`, or safetensors.

    Raises:
        MissingRequirementError: there is nothing at that place, or it holds something else than weights.

    >>> read_weights({"w": torch.zeros(1)})
    {'w': tensor([0.])}
    """
    if isinstance(source, DeltaStore):
        return source.initial_weights()
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if path.is_file():
        return _from_file(path)
    if DeltaStore.exists(source):
        return DeltaStore.open(source).initial_weights()
    remedy = "A sharded checkpoint (a folder) has to be consolidated first." if path.is_dir() else ""
    raise MissingRequirementError(expected("anchor", "a checkpoint file or a store", os.fspath(source), remedy))


def _from_file(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        remedy = "Save the weights alone: `torch.save(model.state_dict(), path)`."
        rule = "a file that can be read without running what is pickled in it"
        raise MissingRequirementError(expected("anchor", rule, str(path), remedy)) from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(weights, Mapping) or not all(isinstance(one, Tensor) for one in weights.values()):
        raise MissingRequirementError(expected("anchor", "a file with weights by name", str(path)))
    return weights
