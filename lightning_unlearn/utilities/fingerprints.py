"""A number for every sample of a batch, found from its values: what tells samples apart where batches carry no ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.utilities.checks import expected

__all__ = ["fingerprints"]


def _tensors(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from _tensors(value)
    elif isinstance(inputs, list | tuple):
        for value in inputs:
            yield from _tensors(value)


def fingerprints(inputs: Any, n: int, *, seed: int = 0) -> list[int]:
    """One number below 2**63 for each of `n` samples: equal for bit-equal inputs, else different (as hashes go).

    Args:
        inputs: A tensor, or mappings and sequences of them; those whose first dimension is not `n` do not count.
        n: Number of samples.
        seed: Gives other numbers.

    Raises:
        MissingRequirementError: no tensor has a row for every sample.

    >>> a, b, again = fingerprints(torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, 2.0]]), 3)
    >>> a == again, a == b, a == fingerprints({"x": torch.tensor([[1.0, 2.0]])}, 1)[0]
    (True, False, True)
    """
    digests = [hashlib.blake2b(str(seed).encode(), digest_size=8) for _ in range(n)]
    found = False
    for tensor in _tensors(inputs):
        if tensor.ndim and tensor.shape[0] == n:
            found = True
            rows = tensor.detach().cpu().contiguous().view(n, -1).view(torch.uint8).numpy()
            for digest, row in zip(digests, rows, strict=True):
                digest.update(row.tobytes())
    if not found:
        rule = f"tensors with a row for each of the {n} samples, to tell them apart"
        raise MissingRequirementError(expected("inputs", rule, type(inputs).__name__, "Draw labels for each batch."))
    return [int.from_bytes(digest.digest(), "little") >> 1 for digest in digests]
