"""Reading a store: commits, heads, and the delta of one step, merged over the ranks that recorded it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from lightning_unlearn.exceptions import MissingDeltaError, StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.commits import Commit, rank_directory, read_commit
from lightning_unlearn.store.compression import Compression
from lightning_unlearn.store.index import StepIndex
from lightning_unlearn.store.layout import join_pieces, with_pieces
from lightning_unlearn.store.opening import Views, corrupted, load_segment
from lightning_unlearn.store.records import EncodedStep, decode_step
from lightning_unlearn.store.segment_reader import Segment
from lightning_unlearn.types import LayerDelta, LayerPiece, ModelSignature, SampleId, StepRecord, StepStatus
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.file_views import DAMAGE
from lightning_unlearn.utilities.files import Files

__all__ = ["REASONS", "StepPart", "StoreReader"]

REASONS: dict[StepStatus, str] = {
    StepStatus.UNWATCHED: "no watched sample was in it",
    StepStatus.OVER_BUDGET: "the size budget had been reached",
    StepStatus.PURGED: "it was subtracted and then purged",
    StepStatus.LOST: "its file was damaged",
}
"""Why a step has no delta."""

_ATTEMPTS = 5


def _plain(error: float) -> float:
    # every NaN is the same object, so that records of equal content compare equal
    return math.nan if math.isnan(error) else float(error)


@dataclass(frozen=True, slots=True)
class StepPart:
    """What one rank stored of a step.

    Attributes:
        file: Name of the segment in the store.
        step: The step, with its payload.
        compression: How the payload was compressed.
    """

    file: str
    step: EncodedStep
    compression: Compression


class _Failure:
    """Why a segment could not be read: it is damaged, or it is in the store no more.

    Not a method of the reader: the index would refer to the reader, and its files stay open until a garbage collection.
    """

    def __init__(self, files: Files, store_id: str, segments: Sequence[Sequence[Segment]]) -> None:
        self._files = files
        self._store_id = store_id
        self._segments = segments

    def __call__(self, segment: Segment, error: Exception, steps: Sequence[int] | None = None) -> Exception:
        rank = next(rank for rank, segments in enumerate(self._segments) if any(one is segment for one in segments))
        name = f"{rank_directory(rank)}/{segment.ref.name}"
        live = {ref.name for ref in read_commit(self._files, self._store_id, rank).segments}
        if segment.ref.name not in live:
            got, remedy = f"a newer state without {name}", "Call `refresh()`, or open it again."
            return StoreMismatchError(expected("store", "as it was when it was opened", got, remedy))
        return corrupted(name, range(segment.ref.start, segment.ref.stop) if steps is None else steps, error)


class StoreReader:
    """One consistent view of all ranks' steps; make a new one to see later commits.

    A writer that goes on may replace files meanwhile, as it merges small segments. Heads that are not read yet are then
    taken from the files that replaced them; later, reading what is gone says that a new view is needed.

    Args:
        files: The store's directory.
        store_id: The store's id.
        signature: Names and shapes of the recorded layers.
        world_size: Number of ranks that recorded.

    Raises:
        StoreCorruptedError: a commit is damaged.
    """

    def __init__(self, files: Files, store_id: str, signature: ModelSignature, world_size: int) -> None:
        self._files = files
        self._views = Views(files)
        self._signature = signature
        self._store_id = store_id
        self.commits: list[Commit] = [read_commit(files, store_id, rank) for rank in range(world_size)]
        self.n_steps = min(commit.n_steps for commit in self.commits)

    @cached_property
    def segments(self) -> list[list[Segment]]:
        """Heads of every rank's segments, read on first use.

        Raises:
            StoreCorruptedError: one is missing or damaged.
        """
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._load()
            except StoreCorruptedError:
                newest = [read_commit(self._files, self._store_id, rank) for rank in range(len(self.commits))]
                if newest == self.commits:
                    raise
                self.commits = newest
                self.n_steps = min(self.n_steps, *(commit.n_steps for commit in newest))
        return self._load()

    def _load(self) -> list[list[Segment]]:
        return [
            [load_segment(self._files, rank_directory(rank), ref, self._views) for ref in commit.segments]
            for rank, commit in enumerate(self.commits)
        ]

    @cached_property
    def index(self) -> StepIndex:
        """Columns of all segments."""
        return StepIndex(self.segments, self.n_steps, self._failure)

    @cached_property
    def _failure(self) -> _Failure:
        return _Failure(self._files, self._store_id, self.segments)

    def record(self, step: int) -> StepRecord:
        """Everything about a step but its delta.

        Raises:
            MissingDeltaError: there is no such step.
            StoreCorruptedError: its record is damaged.
            StoreMismatchError: its file was replaced since the store was opened.
        """
        parts = [self._part(rank, segment, step, payload=False).step for rank, segment in self._at(step)]
        ids: tuple[SampleId, ...] = tuple(sample_id for part in parts for sample_id in part.sample_ids)
        index = self.index
        return StepRecord(
            step=step,
            optimizer=max(part.optimizer for part in parts),
            sample_ids=ids,
            batch_size=int(index.batch_sizes[step]),
            seconds=float(index.seconds[step]),
            status=StepStatus(int(index.status[step])),
            pruning_error=_plain(index.pruning_error[step]),
            rounding_error=_plain(index.rounding_error[step]),
            edited=bool(index.edited[step]),
        )

    def parts(self, step: int, numbers: Collection[int] | None = None) -> list[StepPart]:
        """What each rank stored of a step, still encoded, every checksum checked.

        Args:
            step: The step.
            numbers: Leave out the parts that hold none of these layers or pieces; their payload is not read.

        Local payloads are views into the mapped file: nothing is copied, and they stay valid while they are referred
        to, even after a purge has removed the file.

        Raises:
            MissingDeltaError: there is no such step, or it has no delta.
            StoreCorruptedError: it is damaged.
            StoreMismatchError: its file was replaced since the store was opened.
        """
        segments = self._at(step)
        status = StepStatus(int(self.index.status[step]))
        if status is not StepStatus.STORED:
            remedy = f"The delta is not there because {REASONS[status]}."
            raise MissingDeltaError(expected("step", "one whose delta is stored", f"{step} ({status.name})", remedy))
        if numbers is not None:
            held = [(place, self._part(*place, step, payload=False).step.entries["layer"]) for place in segments]
            segments = [place for place, layers in held if not set(layers.tolist()).isdisjoint(numbers)]
        return [self._part(rank, segment, step, payload=True) for rank, segment in segments]

    def read(self, step: int, pieces: Sequence[LayerPiece] = ()) -> dict[str, LayerDelta]:
        """The delta of a step, by name of the layer, in the order of the signature.

        Args:
            step: The step.
            pieces: The store's list of pieces, not older than this view.

        Raises:
            MissingDeltaError: there is no such step, or it has no delta.
            StoreCorruptedError: it is damaged.
        """
        layers = self._signature.layers
        numbered, parts = with_pieces(self._signature, pieces), self.parts(step)
        deltas: dict[int, LayerDelta] = {}
        for part in parts:
            try:
                found = decode_step(part.step, numbered, part.compression)
                twice = [delta.layer for delta in found if delta.layer in deltas]
                if twice:
                    raise ValueError(f"layer {twice[0]} twice")
            except ValueError as error:
                raise corrupted(part.file, [step], error) from error
            deltas.update((delta.layer, delta) for delta in found)
        cut: dict[int, list[tuple[LayerPiece, LayerDelta]]] = {}
        for number in sorted(number for number in deltas if number >= len(layers)):
            piece = pieces[number - len(layers)]
            cut.setdefault(piece.layer, []).append((piece, deltas.pop(number)))
        for number, several in cut.items():
            try:
                if number in deltas:
                    raise ValueError(f"layer {number} whole and in pieces")
                deltas[number] = join_pieces(layers[number], several)
            except ValueError as error:
                raise corrupted(parts[-1].file, [step], error) from error
        return {layers[number].name: deltas[number] for number in sorted(deltas)}

    def distinct_ids(self) -> set[SampleId]:
        """Every id on disk, those of steps that not every rank has committed included.

        Raises:
            StoreCorruptedError: an id index is damaged.
        """
        segments = self.segments  # which may belong to newer commits
        beyond = max((commit.n_steps for commit in self.commits), default=0)
        return StepIndex(segments, beyond, self._failure).ids_in(range(beyond))

    def _part(self, rank: int, segment: Segment, step: int, *, payload: bool) -> StepPart:
        name, index = f"{rank_directory(rank)}/{segment.ref.name}", step - segment.ref.start
        try:
            encoded = segment.step(index, segment.payload(index) if payload else b"")
        except DAMAGE as error:
            raise self._failure(segment, error, [step]) from error
        return StepPart(name, encoded, segment.compression)

    def _at(self, step: int) -> list[tuple[int, Segment]]:
        _ = self.segments  # which may know that there are fewer steps by now
        if not 0 <= step < self.n_steps:
            raise MissingDeltaError(expected("step", f"one of the {self.n_steps} recorded steps", step))
        return [
            (rank, segments[bisect.bisect_right(segments, step, key=lambda segment: segment.ref.start) - 1])
            for rank, segments in enumerate(self.segments)
        ]
