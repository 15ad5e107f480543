"""Keeping a store in order: its lineage, its checks, repairs, purges, merges and upgrades."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

from filelock import FileLock

from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.store import maintenance
from lightning_unlearn.store.commits import rank_directory
from lightning_unlearn.store.compaction import compact
from lightning_unlearn.store.documents import FORMAT_VERSION, to_document
from lightning_unlearn.store.info import Damage, VerificationReport
from lightning_unlearn.store.lineage import Lineage, lineage_to_dict
from lightning_unlearn.store.records import check_ids
from lightning_unlearn.store.store_documents import LINEAGE, STORE
from lightning_unlearn.store.upgrade import upgrade_store
from lightning_unlearn.store.view import StoreView
from lightning_unlearn.store.writer import SEGMENT_BYTES
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import check_positive_int

__all__ = ["StoreUpkeep"]


class StoreUpkeep(StoreView):
    """The part of `DeltaStore` that changes what is there already; nothing here adds a step."""

    def update_lineage(self, change: Callable[[Lineage], Lineage]) -> Lineage:
        """Replace the lineage by `change(lineage)`, in one atomic write; processes of one machine take turns.

        Where the file system has no locks, of two changes at the same moment the first is lost.
        """
        with self._turn():
            self._lineage = None
            lineage = change(self.lineage)
            body = {"store_id": self.store_id, **lineage_to_dict(lineage)}
            self._files.publish(self.lineage_file, to_document("lineage", body))
            self._lineage = lineage
        return lineage

    def _turn(self) -> AbstractContextManager[object]:
        return FileLock(self._files.path(f"{LINEAGE}.lock")) if self._files.is_local else nullcontext()

    def verify(self) -> VerificationReport:
        """Check every byte; damage is reported, not raised."""
        report = maintenance.verify(self._files, self.store_id, self.world_size, self._documents())
        if self.is_part or any(damage.file == self.lineage_file for damage in report.damages):
            return report
        try:
            missing = StoreView(self._files).missing_ranks
        except (LightningUnlearnError, OSError):  # a commit cannot be read, which is in the report
            return report
        problem = "a part that its rank recorded on another node, and that was not joined yet"
        absent = [Damage(rank_directory(rank), problem, repairable=False) for rank in missing]
        return replace(report, damages=(*report.damages, *absent))

    def repair(self) -> VerificationReport:
        """Drop what is damaged and keep the rest: the delta of a step, or the step's ids too where they are damaged.

        Such steps keep their place with status `LOST`. What cannot be repaired (weights, lineage) stays as it is.

        Returns:
            What was found, as `verify` does.
        """
        report = self.verify()
        maintenance.repair(self._files, self.store_id, self.world_size, report)
        self._reader = self._lineage = None
        return report

    def purge(self, sample_ids: Collection[SampleId], steps: Collection[int] = ()) -> None:
        """Remove ids from every step, and the deltas of `steps`, for good; the rest of each record stays.

        Segments are written anew and the old files deleted. A purge that was interrupted is finished by calling it
        again; one that is finished changes nothing.

        Raises:
            StoreMismatchError: a writer is open.
            StoreCorruptedError: a segment is damaged; repair the store first.
            MissingDeltaError: a part was recorded on another node, and is not joined yet: it may hold the ids.
            ValueError: not a collection of integers and strings.
        """
        self.check_complete()
        ids = set(check_ids(sample_ids))
        maintenance.purge(self._files, self.store_id, self.world_size, ids, {int(step) for step in steps})
        self._reader = None

    def compact(self, segment_bytes: int = SEGMENT_BYTES) -> int:
        """Merge neighbouring segments that fit into one of `segment_bytes`, until there are none; no record changes.

        Returns:
            Number of segments that became part of larger ones.

        Raises:
            StoreMismatchError: a writer is open.
            StoreCorruptedError: a segment is damaged; repair the store first.
        """
        limit = check_positive_int("segment_bytes", segment_bytes)
        self._reader = None
        return compact(self._files, self.store_id, self.world_size, limit)

    def upgrade(self) -> int:
        """Rewrite a store of an older format version in the current one, which older releases cannot open.

        Every checksum is checked before and after. An upgrade that was interrupted is finished by calling it again;
        one that is finished changes nothing. The disk holds at most one segment twice.

        Returns:
            Number of segments that were rewritten.

        Raises:
            StoreMismatchError: a writer is open.
            StoreCorruptedError: a segment is damaged; repair the store first.
        """
        self._reader = None
        count = upgrade_store(
            self._files, self.store_id, self.world_size, STORE, lambda: self.update_lineage(lambda lineage: lineage)
        )
        self.version = FORMAT_VERSION
        return count

    def _documents(self) -> dict[str, Callable[[], object]]:
        def lineage() -> Lineage:
            self._lineage = None
            return self.lineage

        if self.is_part:
            return {}
        files, layouts = {self.initial_file: self._initial_digest}, dict[str, str]()
        try:
            files.update(lineage().initial)
            layouts.update(lineage().layouts)
        except LightningUnlearnError:  # which is reported as the lineage's own damage
            self._lineage = None
        initial = {name: partial(self._read_initial, name, digest) for name, digest in files.items()}
        cut = {name: partial(self._read_layout, name, digest) for name, digest in layouts.items()}
        return {self.lineage_file: lineage, **initial, **cut}
