"""Nested states, such as an optimizer's, as named tensors and plain JSON: no pickle, and exactly back again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import expected

__all__ = ["flatten_state", "unflatten_state", "without_shared_memory"]


def flatten_state(state: object, path: str, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors of a state into `tensors`, named by their path, and return the rest as JSON.

    Every container is an object with one key that says what it is, so tuples stay tuples and the keys of dictionaries
    keep their types.

    Args:
        state: Tensors, NumPy arrays, numbers, strings, booleans and `None`, in dictionaries, lists and tuples.
        path: Where the state is, for the names of tensors and for the message of an error.
        tensors: Filled with tensors on the CPU; not copies where they were there already.

    Raises:
        TypeError: something else is in it.

    >>> tensors = {}
    >>> flatten_state({"step": torch.tensor(3.0), 0: (0.9, None)}, "state", tensors)
    {'dict': [['step', {'tensor': 'state/step'}], [0, {'tuple': [0.9, None]}]]}
    >>> list(tensors)
    ['state/step']
    """
    if isinstance(state, Tensor | np.ndarray):
        name = path
        while name in tensors:  # keys 1 and "1" have the same path
            name += "'"
        if isinstance(state, np.ndarray):
            tensors[name] = torch.from_numpy(state.astype(np.float64 if state.dtype.kind == "f" else np.int64))
            return {"array": [name, state.dtype.str]}
        tensors[name] = state.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(state, Mapping):
        if not all(isinstance(key, int | str) for key in state):
            raise TypeError(expected(path, "a dictionary with keys that are strings or integers", list(state)))
        return {"dict": [[key, flatten_state(value, f"{path}/{key}", tensors)] for key, value in state.items()]}
    if isinstance(state, list | tuple):
        parts = [flatten_state(value, f"{path}/{place}", tensors) for place, value in enumerate(state)]
        return {"tuple" if isinstance(state, tuple) else "list": parts}
    if isinstance(state, float | np.floating):
        value = float(state)
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(state, int | np.integer) and not isinstance(state, bool):
        return int(state)
    if state is None or isinstance(state, bool | str):
        return state
    raise TypeError(
        expected(path, "made of tensors, numbers, strings and collections", type(state).__name__, "Leave it out.")
    )


def without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, copied where they share memory with one before them: safetensors refuses those.

    >>> import torch
    >>> tied = torch.zeros(2)
    >>> {name: one is tied for name, one in without_shared_memory({"a": tied, "b": tied}).items()}
    {'a': True, 'b': False}
    """
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def unflatten_state(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state behind what `flatten_state` returned.

    >>> tensors = {}
    >>> unflatten_state(flatten_state({0: (0.9, [float("inf")])}, "state", tensors), tensors)
    {0: (0.9, [inf])}

    Raises:
        ValueError: not a tree that `flatten_state` makes, or a tensor is missing.
    """
    if not isinstance(tree, dict):
        return tree
    try:
        ((kind, content),) = tree.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "array":
            name, dtype = content
            return tensors[name].numpy().astype(dtype)
        if kind == "dict":
            return {key: unflatten_state(value, tensors) for key, value in content}
        if kind in ("list", "tuple"):
            parts = [unflatten_state(value, tensors) for value in content]
            return tuple(parts) if kind == "tuple" else parts
        if kind == "float":
            return float(content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"an unreadable state ({error!r})") from error
    raise ValueError(f"a state of unknown kind {kind!r}")
