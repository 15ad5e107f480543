"""What a writer does to the disk: publish records and anchors, merge small segments, drop the newest steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lightning_unlearn.exceptions import UnlearningWarning
from lightning_unlearn.store.anchors import AnchorContents
from lightning_unlearn.store.commits import AnchorRef, CommitLog
from lightning_unlearn.store.compaction import merge_segments, segments_to_merge
from lightning_unlearn.store.compression import Compression
from lightning_unlearn.store.records import EncodedStep
from lightning_unlearn.store.rewrite import slice_segment
from lightning_unlearn.store.segment import SegmentRef, build_segment
from lightning_unlearn.utilities.files import Files

__all__ = ["Publication"]


class Publication:
    """Changes one rank's part of a store; each call is one commit, and another one for each merge behind it.

    Args:
        files: The store's directory.
        store_id: The store's id.
        log: The right to write, and the newest commit.
        compression: Of new segments.
        segment_bytes: Bound on the size of a merged segment.
    """

    def __init__(
        self, files: Files, store_id: str, log: CommitLog, compression: Compression, segment_bytes: int
    ) -> None:
        self._files = files
        self._store_id = store_id
        self._log = log
        self._compression = compression
        self._segment_bytes = segment_bytes
        self._merging = True

    @property
    def delta_bytes(self) -> int:
        """Bytes of all published deltas."""
        return sum(ref.payload_bytes for ref in self._log.head.segments)

    def publish(self, steps: list[EncodedStep], anchor: AnchorContents | None = None) -> None:
        """Make steps, and then an anchor behind them, part of the store; `steps` is emptied."""
        new_segments: list[SegmentRef] = []
        new_anchors: list[AnchorRef] = []
        try:
            if steps:
                new_segments.append(self._publish_steps(steps))
            if anchor is not None:
                name = self._log.anchor_name(anchor.step)
                new_anchors.append(AnchorRef(name, anchor.step, len(anchor.data), anchor.digest))
                self._log.publish_segment(new_anchors[-1], [anchor.data])
            head = self._log.head
            self._log.commit((*head.segments, *new_segments), (*head.anchors, *new_anchors))
        except OSError:
            self._log.discard((*new_segments, *new_anchors))
            raise
        steps.clear()  # what follows takes the room of these records
        self._merge()

    def _publish_steps(self, steps: Sequence[EncodedStep]) -> SegmentRef:
        ref, chunks = build_segment(
            steps,
            name=self._log.segment_name(),
            start=self._log.head.n_steps,
            rank=self._log.rank,
            store_id=self._store_id,
            compression=self._compression,
        )
        self._log.publish_segment(ref, chunks)
        return ref

    def truncate(self, steps: list[EncodedStep], n_steps: int) -> None:
        """Drop everything from step `n_steps` on, after publishing `steps`, in which nothing is dropped."""
        if steps:
            self.publish(steps)
        segments = [ref for ref in self._log.head.segments if ref.stop <= n_steps]
        straddling = [ref for ref in self._log.head.segments if ref.start < n_steps < ref.stop]
        segments += [slice_segment(self._files, self._log, self._store_id, ref, n_steps) for ref in straddling]
        self._log.commit(segments)
        self._log.clean()

    def _merge(self) -> None:
        while self._merging and (run := segments_to_merge(self._log.head.segments, self._segment_bytes)) is not None:
            segments = self._log.head.segments
            try:
                merged = merge_segments(self._files, self._log, self._store_id, segments[run])
            except OSError as error:  # an older part is damaged, or both do not fit on the disk: recording can go on
                self._merging = False
                warnings.warn(f"Small segments are no longer merged. {error}", UnlearningWarning, stacklevel=2)
                return
            try:
                self._log.commit((*segments[: run.start], merged, *segments[run.stop :]))
            except OSError:
                self._log.discard([merged])
                raise
            for ref in segments[run]:
                self._files.delete(f"{self._log.directory}/{ref.name}")
