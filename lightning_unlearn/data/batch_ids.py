"""Ids that a batch holds itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, get_args

import numpy as np
from torch import Tensor

from lightning_unlearn.data.positions import as_sample_id
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.types import Part, SampleId
from lightning_unlearn.utilities.checks import expected

__all__ = ["IdSource", "disagreeing_size", "ids_in"]

IdSource: TypeAlias = str | Callable[[Any], Sequence[SampleId]]
"""Key or attribute of the batch that holds its ids, or a function of the batch."""


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)


def disagreeing_size(batch: Any, n: int) -> int | None:
    """The batch size, where all tensors agree on one that is not `n` and none has a dimension of size `n`."""
    shapes = [tensor.shape for tensor in _tensors(batch) if tensor.ndim]
    sizes = {shape[0] for shape in shapes}
    return sizes.pop() if len(sizes) == 1 and not any(n in shape for shape in shapes) else None


def ids_in(batch: Any, source: IdSource) -> list[SampleId]:
    """The ids of a batch, in order and with repeats; of one of `UnlearningDataModule` those of every part.

    A function may name more ids than the batch is long: those of each loader's batch, or of both halves of a pair.

    Raises:
        MissingRequirementError: `source` finds none, or not one for each sample of the batch.
        DeletionRequestError: an id is neither an int nor a str.

    >>> ids_in({"id": [3, 1]}, "id"), ids_in([7, 8], lambda batch: batch)
    ([3, 1], [7, 8])
    """
    return [sample for piece in _parts_of(batch) for sample in _ids_of(piece, source)]


def _parts_of(batch: Any) -> list[Any]:
    """The user's own batches in one of `UnlearningDataModule`, a mapping of parts; any other batch is the user's."""
    if isinstance(batch, Mapping) and batch and set(batch) <= set(get_args(Part)):
        return list(batch.values())
    return [batch]


def _ids_of(batch: Any, source: IdSource) -> list[SampleId]:
    if isinstance(source, str):
        try:
            found = batch[source] if isinstance(batch, Mapping) else getattr(batch, source)
        except (KeyError, AttributeError):
            got = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            remedy = "Name a key that the batch has, or pass a function of the batch."
            rule = "a key or attribute of every training batch"
            raise MissingRequirementError(
                expected("sample_id", rule, source, f"The batch is {got!r}. {remedy}")
            ) from None
    else:
        found = source(batch)
    if isinstance(found, Tensor | np.ndarray):
        found = found.reshape(-1).tolist()
    ids = [as_sample_id("sample_id", value) for value in ([found] if isinstance(found, str | int) else found)]
    size = disagreeing_size(batch, len(ids))
    if size is not None and not isinstance(source, str) and len(ids) > size:
        size = None
    if not ids or size is not None:
        rule = f"one id for each of the {size} samples of the batch" if size else "the ids of the batch"
        raise MissingRequirementError(expected("sample_id", rule, f"{len(ids)} ids"))
    return ids
