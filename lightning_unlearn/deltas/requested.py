"""Which samples a request names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Self

from lightning_unlearn.exceptions import DeletionRequestError
from lightning_unlearn.store.records import check_ids
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import expected, shorten

__all__ = ["RequestedSamples"]


@dataclass(frozen=True, init=False)
class RequestedSamples:
    """Samples that a model is to forget, checked; `DeletionRequest` adds the plan.

    >>> RequestedSamples(["user-7", 3])
    RequestedSamples(sample_ids=('user-7', 3))

    Args:
        sample_ids: Their ids, as recorded: positions in the dataset, or keys.

    Raises:
        DeletionRequestError: no id, an id twice, or one that is neither an integer nor a string.
    """

    sample_ids: tuple[SampleId, ...]

    def __init__(self, sample_ids: Iterable[SampleId]) -> None:
        if isinstance(sample_ids, str | bytes):
            raise DeletionRequestError(expected("sample_ids", "a collection of ids", sample_ids, "Put it in a list."))
        try:
            ids = check_ids(sample_ids)
        except (ValueError, TypeError) as error:
            raise DeletionRequestError(
                expected("sample_ids", "integers or strings", sample_ids, "Ask with the ids that were recorded.")
            ) from error
        if not ids:
            raise DeletionRequestError(expected("sample_ids", "at least one id", [], "Name the samples to forget."))
        twice = [one for one, count in Counter(ids).items() if count > 1]
        if twice:
            got = f"duplicate ids: {shorten(twice)}"
            raise DeletionRequestError(expected("sample_ids", "ids that occur once each", got, "Remove the repeats."))
        object.__setattr__(self, "sample_ids", ids)

    def without(self, sample_ids: Collection[SampleId]) -> Self:
        """The request without some of its ids, such as those that a plan calls already forgotten.

        Raises:
            DeletionRequestError: nothing is left.
        """
        return type(self)([one for one in self.sample_ids if one not in sample_ids])
