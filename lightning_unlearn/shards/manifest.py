"""What a SISA training is made of: which sample is in which slice of which shard, what is gone, and what follows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np

from lightning_unlearn.exceptions import DeletionRequestError, MissingRequirementError
from lightning_unlearn.store.documents import digest_of
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import check_positive_int, expected, shorten

__all__ = ["SisaManifest", "SisaPlan", "SisaStage", "assign", "slice_epochs"]


def slice_epochs(epochs: int, slices: int) -> tuple[int, ...]:
    r"""Epochs of each slice's training, such that every sample is seen as often as in `epochs` epochs on all of them.

    The k-th of R trainings is on slices 1..k, so with e' epochs each the samples of a shard are seen
    sum_k e' k/R = e'(R+1)/2 times on average: e' = 2e/(R+1). Whole numbers are differences of int(k e'), so that they
    sum to int(R e').

    Raises:
        ValueError: a slice would get no epoch.

    >>> slice_epochs(20, 4), slice_epochs(10, 4), slice_epochs(7, 1)
    ((8, 8, 8, 8), (4, 4, 4, 4), (7,))
    >>> slice_epochs(7, 3), slice_epochs(8, 4)
    ((3, 4, 3), (3, 3, 3, 3))
    """
    check_positive_int("epochs", epochs)
    check_positive_int("slices", slices)
    # In whole numbers: int(k * 2 * e / (R + 1)) in floating point may fall short of an exact quotient by one.
    ends = [2 * epochs * (place + 1) // (slices + 1) for place in range(slices)]
    found = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    if min(found) < 1:
        least = (slices + 2) // 2
        raise ValueError(
            expected("epochs", f"at least {least} for {slices} slices, so that each is trained on", epochs)
        )
    return found


def assign(ids: Iterable[SampleId], shards: int, slices: int, seed: int) -> dict[SampleId, int]:
    """Number of the part, shard x slices + slice, of every id: a uniform draw of parts that differ by one id at most.

    It depends on the set of ids and the seed, not on their order in the data.

    Raises:
        MissingRequirementError: fewer ids than parts.

    >>> parts = assign(range(7), 2, 3, seed=0)
    >>> sorted(parts) == list(range(7)), sorted(parts.values()), assign(range(6, -1, -1), 2, 3, seed=0) == parts
    (True, [0, 0, 1, 2, 3, 4, 5], True)
    """
    ordered = sorted(set(ids), key=lambda one: (isinstance(one, str), one))
    parts = check_positive_int("shards", shards) * check_positive_int("slices", slices)
    if len(ordered) < parts:
        rule = f"of at least {parts} samples, for {shards} shards of {slices} slices"
        raise MissingRequirementError(expected("data", rule, f"{len(ordered)} ids", "Ask for fewer."))
    drawn = np.random.default_rng(seed).permutation(len(ordered)).tolist()
    return {ordered[place]: number * parts // len(ordered) for number, place in enumerate(drawn)}


@dataclass(frozen=True, slots=True)
class SisaStage:
    """One training: of one shard, on its slices up to one of them.

    Attributes:
        shard: Number of the shard.
        slice: Number of the last slice in it.
        name: Checkpoint of its result, named by all that made it.
        before: Checkpoint it starts from.
        epochs: Length.
        ids: Samples it is trained on.
        rows: How many rows of the data these are.
    """

    shard: int
    slice: int
    name: str
    before: str
    epochs: int
    ids: frozenset[SampleId]
    rows: int


@dataclass(frozen=True, slots=True)
class SisaPlan:
    """What it takes to forget samples.

    Attributes:
        first_slices: Touched shard -> the first slice of it that has to be trained again.
        sample_epochs: Samples x epochs to train again.
        full_sample_epochs: Samples x epochs of training all shards without the samples from the start.
    """

    first_slices: Mapping[int, int]
    sample_epochs: int
    full_sample_epochs: int

    @property
    def share(self) -> float:
        """Share of a training from the start."""
        return self.sample_epochs / self.full_sample_epochs

    def __str__(self) -> str:
        where = ", ".join(f"shard {shard} from slice {first} on" for shard, first in self.first_slices.items())
        return f"{where}: {self.sample_epochs:,} samples x epochs, {self.share:.1%} of a training from the start"


@dataclass(frozen=True, slots=True)
class SisaManifest:
    """The whole state of a SISA training but for the weights; frozen: a deletion gives another one.

    Attributes:
        origin: Tells this training from others.
        seed: All random numbers come from it.
        shards: Number of shards.
        slices: Slices in a shard.
        epochs: Of each slice's training.
        keyed: Whether ids are keys rather than positions.
        root_length: Length of the dataset that positions count; `None` for keys.
        rows: The id of every row of the training data, in its order.
        parts: Number of the part of every id, in the order of first occurrence.
        deleted: Ids that were asked to be forgotten, in order.
        signature: Names, shapes and dtypes of the module's tensors.
        loader: Batch size and way of drawing.
        trainer: Settings of the Trainer that the weights depend on; none in folders of earlier releases.
    """

    origin: str
    seed: int
    shards: int
    slices: int
    epochs: tuple[int, ...]
    keyed: bool
    root_length: int | None
    rows: tuple[SampleId, ...]
    parts: tuple[int, ...]
    deleted: tuple[SampleId, ...]
    signature: tuple[tuple[str, tuple[int, ...], str], ...]
    loader: Mapping[str, Any]
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def to_body(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Self:
        """The reverse of `to_body`."""
        lists = {name: tuple(body[name]) for name in ("epochs", "rows", "parts", "deleted")}
        signature = tuple((name, tuple(shape), dtype) for name, shape, dtype in body["signature"])
        return cls(**{**body, **lists, "signature": signature})

    @property
    def assignment(self) -> dict[SampleId, tuple[int, int]]:
        """Shard and slice of every id, deleted ones as well."""
        return {one: divmod(part, self.slices) for one, part in zip(dict.fromkeys(self.rows), self.parts, strict=True)}

    def without(self, ids: Sequence[SampleId]) -> Self:
        """The same training with more samples deleted.

        Raises:
            DeletionRequestError: unknown ids, some that are deleted already, or nothing would be left.
        """
        known, gone = set(self.rows), set(self.deleted)
        unknown = [one for one in ids if one not in known]
        if unknown:
            rule = "ids of samples that were trained on"
            raise DeletionRequestError(expected("ids", rule, f"unknown ones: {shorten(unknown)}"))
        again = [one for one in ids if one in gone]
        if again:
            rule, remedy = "ids that are not forgotten yet", "Leave them out of the request."
            raise DeletionRequestError(expected("ids", rule, f"some that are: {shorten(again)}", remedy))
        if known <= gone | set(ids):
            raise DeletionRequestError(expected("ids", "fewer than all samples that are left", f"all {len(ids)}"))
        return replace(self, deleted=(*self.deleted, *ids))

    def first_checkpoint(self, shard: int) -> str:
        """Name of the checkpoint with a shard's initial weights."""
        return f"shard-{shard}/start-{_digest('start', self.seed, shard)}.ckpt"

    def stages(self) -> dict[int, list[SisaStage]]:
        """The trainings of every shard that has samples left; an empty slice has none, nor has an empty shard.

        The name of a result is a digest of everything behind it, so what a deletion touches has other names, and what
        it does not touch has the same.
        """
        gone = set(self.deleted)
        rows = Counter(one for one in self.rows if one not in gone)
        members: dict[tuple[int, int], list[SampleId]] = {}
        for one, place in self.assignment.items():
            if one not in gone:
                members.setdefault(place, []).append(one)
        found: dict[int, list[SisaStage]] = {}
        for shard in range(self.shards):
            before, ids = self.first_checkpoint(shard), frozenset[SampleId]()
            for number in range(self.slices):
                own = members.get((shard, number), [])
                if not own:
                    continue
                ids |= frozenset(own)
                digest = _digest(before, self.epochs[number], sorted(map(_plain, own)))
                name = f"shard-{shard}/slice-{number}-{digest}.ckpt"
                seen = sum(rows[one] for one in ids)
                found.setdefault(shard, []).append(
                    SisaStage(shard, number, name, before, self.epochs[number], ids, seen)
                )
                before = name
        return found

    def plan(self, ids: Sequence[SampleId]) -> SisaPlan:
        """What forgetting these samples as well takes; raises as `without`."""
        after = self.without(ids)
        known = {stage.name for stages in self.stages().values() for stage in stages}
        stages = [stage for trained in after.stages().values() for stage in trained]
        touched: dict[int, int] = {}
        for shard, number in sorted(self.assignment[one] for one in ids):
            touched.setdefault(shard, number)
        again = sum(stage.epochs * stage.rows for stage in stages if stage.name not in known)
        return SisaPlan(touched, again, sum(stage.epochs * stage.rows for stage in stages))


def _plain(one: SampleId) -> str:
    return f"{type(one).__name__}:{one}"


def _digest(*parts: Any) -> str:
    return digest_of(json.dumps(parts).encode())
