"""Reading a store: commits, heads, and the delta of one step, merged over the ranks that recorded it."""

from __future__ import annotations

import bisect
from functools import cached_property

from lightning_unlearn.exceptions import MissingDeltaError
from lightning_unlearn.store.commits import Commit, rank_directory, read_commit
from lightning_unlearn.store.documents import digest_of
from lightning_unlearn.store.index import StepIndex
from lightning_unlearn.store.records import decode_step
from lightning_unlearn.store.rewrite import corrupted
from lightning_unlearn.store.segment import Segment, SegmentRef
from lightning_unlearn.types import LayerDelta, ModelSignature, SampleId, StepRecord, StepStatus
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.files import Files

__all__ = ["REASONS", "StoreReader", "load_segment"]

REASONS: dict[StepStatus, str] = {
    StepStatus.UNWATCHED: "no watched sample was in it",
    StepStatus.OVER_BUDGET: "the size budget had been reached",
    StepStatus.PURGED: "it was subtracted and then purged",
    StepStatus.LOST: "its file was damaged",
}
"""Why a step has no delta."""


def load_segment(files: Files, directory: str, ref: SegmentRef) -> Segment:
    """The head of a segment, checked against its commit.

    Raises:
        StoreCorruptedError: it is missing or damaged.
    """
    name = f"{directory}/{ref.name}"
    try:
        head = files.read(name, 0, ref.head_bytes)
        if digest_of(head) != ref.digest:
            raise ValueError("the head does not fit its checksum")
        return Segment(ref, head)
    except (ValueError, OSError) as error:
        raise corrupted(name, range(ref.start, ref.stop), error) from error


class StoreReader:
    """One consistent view of all ranks' steps; make a new one to see later commits.

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
        self._signature = signature
        self.commits: list[Commit] = [read_commit(files, store_id, rank) for rank in range(world_size)]
        self.n_steps = min(commit.n_steps for commit in self.commits)

    @cached_property
    def segments(self) -> list[list[Segment]]:
        """Heads of every rank's segments, read on first use."""
        return [
            [load_segment(self._files, rank_directory(rank), ref) for ref in commit.segments]
            for rank, commit in enumerate(self.commits)
        ]

    @cached_property
    def index(self) -> StepIndex:
        """Columns of all segments."""
        return StepIndex(self.segments, self.n_steps)

    def record(self, step: int) -> StepRecord:
        """Everything about a step but its delta.

        Raises:
            MissingDeltaError: there is no such step.
        """
        parts = [segment.step(step - segment.ref.start) for _, segment in self._at(step)]
        ids: tuple[SampleId, ...] = tuple(sample_id for part in parts for sample_id in part.sample_ids)
        return StepRecord(
            step=step,
            optimizer=max(part.optimizer for part in parts),
            sample_ids=ids,
            batch_size=int(self.index.batch_sizes[step]),
            seconds=float(self.index.seconds[step]),
            status=StepStatus(int(self.index.status[step])),
        )

    def read(self, step: int) -> dict[str, LayerDelta]:
        """The delta of a step, by name of the layer, in the order of the signature.

        Raises:
            MissingDeltaError: there is no such step, or it has no delta.
            StoreCorruptedError: it is damaged.
        """
        segments = self._at(step)
        status = StepStatus(int(self.index.status[step]))
        if status is not StepStatus.STORED:
            remedy = f"The delta is not there because {REASONS[status]}."
            raise MissingDeltaError(expected("step", "one whose delta is stored", f"{step} ({status.name})", remedy))
        deltas: dict[int, LayerDelta] = {}
        for rank, segment in segments:
            name, index = f"{rank_directory(rank)}/{segment.ref.name}", step - segment.ref.start
            try:
                payload = self._files.read(name, *segment.payload_span(index))
                segment.check_payload(index, payload)
                parts = decode_step(segment.step(index, payload), self._signature, segment.compression)
            except (ValueError, OSError) as error:
                raise corrupted(name, [step], error) from error
            for part in parts:
                if part.layer in deltas:
                    raise corrupted(name, [step], f"layer {part.layer} twice")
                deltas[part.layer] = part
        return {self._signature.layers[layer].name: deltas[layer] for layer in sorted(deltas)}

    def distinct_ids(self) -> set[SampleId]:
        """Every id on disk, those of steps that not every rank has committed included."""
        return {one for segments in self.segments for segment in segments for one in segment.distinct(slice(None))}

    def _at(self, step: int) -> list[tuple[int, Segment]]:
        if not 0 <= step < self.n_steps:
            raise MissingDeltaError(expected("step", f"one of the {self.n_steps} recorded steps", step))
        return [
            (rank, segments[bisect.bisect_right(segments, step, key=lambda segment: segment.ref.start) - 1])
            for rank, segments in enumerate(self.segments)
        ]
