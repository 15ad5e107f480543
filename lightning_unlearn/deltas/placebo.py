"""An innocent group of the same size and placement: the control of every delta-based method."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from torch import nn

from lightning_unlearn.deltas.planner import recognise
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import DeletionRequestError, UnlearningWarning
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import check_positive_int, expected, shorten

__all__ = ["placebo_request"]

_SAMPLED_STEPS = 256
"""Steps that are looked at to find candidates; enough to meet every kind of subject, and cheap in large stores."""

_TOLERANCE = math.log(1.5)


def placebo_request(
    store: DeltaStore, request: DeletionRequest, model: nn.Module | None = None, *, seed: int = 0, tries: int = 40
) -> DeletionRequest:
    """Find other samples that were placed like the requested ones: as many ids, in about as many steps and shares.

    Subtract them in the same way from the same original (`unlearn(..., control_for=request)`), and give the result to
    `evaluate(placebo=...)`. What the placebo forgets as well is damage, not forgetting.

    Heuristic: groups are drawn, some at random and some from ids that met in the same batches, and the one that is
    placed most alike is taken.

    Args:
        store: What was recorded.
        request: The request to imitate.
        model: The weights it is about; `None` stands for the latest the store knows.
        seed: Seed of the draws.
        tries: Groups to compare.

    Returns:
        A request for innocent ids only.

    Raises:
        DeletionRequestError: the requested ids were not recorded, or there are too few others.

    Warns:
        UnlearningWarning: no group was found that is placed alike.
    """
    check_positive_int("tries", tries)
    state = recognise(store, model)
    wanted = _placed(store, request.sample_ids, state.ranges)
    if wanted is None:
        got, remedy = (
            shorten(request.sample_ids),
            "No step in these weights names them: check the recording's identity.",
        )
        raise DeletionRequestError(expected("request", "ids that were recorded", got, remedy))
    rng = np.random.default_rng(seed)
    steps = np.concatenate([np.arange(start, stop) for start, stop in state.ranges])
    drawn = np.sort(rng.choice(steps, min(_SAMPLED_STEPS, len(steps)), replace=False)).tolist()
    batches = [_innocent(store.record(step).sample_ids, request) for step in drawn]
    best, distance = None, math.inf
    for group in _groups(batches, len(request.sample_ids), wanted[1] / len(request.sample_ids), rng, tries):
        found = _placed(store, group, state.ranges)
        if found is not None and (off := _distance(found, wanted)) < distance:
            best, distance = group, off
    if best is None:
        rule = f"such that {len(request.sample_ids)} other ids are left"
        raise DeletionRequestError(expected("request", rule, f"{len(set().union(*batches))} others in the store"))
    if distance > 2 * _TOLERANCE:
        warnings.warn(
            "No innocent samples were placed like the requested ones, so this placebo says less than it should: it "
            "touches more or fewer steps, or makes up another share of them.",
            UnlearningWarning,
            stacklevel=2,
        )
    return DeletionRequest(best)


def _innocent(ids: Sequence[SampleId], request: DeletionRequest) -> Counter[SampleId]:
    asked = set(request.sample_ids)
    return Counter(one for one in ids if one not in asked)


def _placed(
    store: DeltaStore, ids: Sequence[SampleId], within: Sequence[tuple[int, int]]
) -> tuple[float, float] | None:
    """Touched steps, and samples in each of them on average."""
    steps, counts = store.counts_of(ids, within=within)
    return (float(len(steps)), float(counts.mean())) if len(steps) else None


def _distance(found: tuple[float, float], wanted: tuple[float, float]) -> float:
    return sum(abs(math.log(one / other)) for one, other in zip(found, wanted, strict=True))


def _groups(
    batches: Sequence[Counter[SampleId]], size: int, multiplicity: float, rng: np.random.Generator, tries: int
) -> Iterator[list[SampleId]]:
    """Candidates: for one id, those that occur about as often in their batches; else random ids and companions."""
    met: Counter[SampleId] = Counter()
    rows: Counter[SampleId] = Counter()
    for batch in batches:
        met.update(batch.keys())
        rows.update(batch)
    # Sorted by text first: the order of a set of strings differs between processes.
    ids = sorted(met, key=lambda one: (str(type(one)), str(one)))
    if len(ids) < size:
        return
    if size == 1:
        alike = {one: abs(math.log(rows[one] / met[one] / multiplicity)) for one in ids}
        order = [ids[number] for number in rng.permutation(len(ids))]
        for one in sorted(order, key=alike.__getitem__)[:tries]:
            yield [one]
        return
    for number in range(tries):
        if number % 2:
            yield [ids[index] for index in rng.choice(len(ids), size, replace=False)]
            continue
        first = ids[int(rng.integers(len(ids)))]
        companions: Counter[SampleId] = Counter()
        for batch in batches:
            if first in batch:
                companions.update(batch.keys())
        group = [one for one, _ in companions.most_common(size)]
        if len(group) == size:
            yield group
