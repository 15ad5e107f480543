"""What a writer does to the disk: publish records and anchors, merge small segments, drop the newest steps."""

from __future__ import annotations

import warnings

from lightning_unlearn.exceptions import StoreCorruptedError, UnlearningWarning
from lightning_unlearn.store.anchors import AnchorContents
from lightning_unlearn.store.commits import AnchorRef, CommitLog
from lightning_unlearn.store.compaction import merge_segments, segments_to_merge
from lightning_unlearn.store.compression import Compression
from lightning_unlearn.store.records import EncodedStep
from lightning_unlearn.store.rewrite import slice_segment
from lightning_unlearn.store.segment import build_segment
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
        head = self._log.head
        segments, anchors = head.segments, head.anchors
        if steps:
            ref, chunks = build_segment(
                steps,
                name=self._log.segment_name(),
                start=head.n_steps,
                rank=self._log.rank,
                store_id=self._store_id,
                compression=self._compression,
            )
            self._log.publish_segment(ref, chunks)
            del chunks
            segments = (*segments, ref)
        if anchor is not None:
            kept = AnchorRef(self._log.anchor_name(anchor.step), anchor.step, len(anchor.data), anchor.digest)
            self._log.publish_segment(kept, [anchor.data])
            anchors = (*anchors, kept)
        self._log.commit(segments, anchors)
        steps.clear()  # what follows takes the room of these records
        self._merge()

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
            except StoreCorruptedError as error:  # an older part is damaged: the recording itself can go on
                self._merging = False
                warnings.warn(f"Small segments are no longer merged. {error}", UnlearningWarning, stacklevel=2)
                return
            self._log.commit((*segments[: run.start], merged, *segments[run.stop :]))
            for ref in segments[run]:
                self._files.delete(f"{self._log.directory}/{ref.name}")
