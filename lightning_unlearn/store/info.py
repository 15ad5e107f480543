"""What a store says of itself: contents, and the result of checking every byte."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_unlearn.store.lineage import LedgerEntry, Run
from lightning_unlearn.types import DataFingerprint, ModelState, RecordingSettings
from lightning_unlearn.utilities.checks import shorten

__all__ = ["Damage", "StoreInfo", "VerificationReport"]


def _median(error: float | None) -> str:
    return "not measured" if error is None else f"{error:.3g} of the change's norm (median)"


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What a store holds.

    Attributes:
        url: Where it is.
        store_id: Its id.
        format_versions: Versions of the disk format of its files, ascending; more than one after a release that writes
            another has gone on with it.
        steps: Recorded steps.
        stored: Steps whose delta is there.
        bytes: Size of all its files.
        bytes_per_kept: Bytes of deltas per kept weight, positions and values together; 0.0 without deltas.
        kept: Kept weights over all deltas.
        distinct_ids: Number of different sample ids.
        seconds: Wall time of all recorded steps.
        pruning_error: Median over the measured steps of the relative L2 error that pruning made; `None` without any.
        rounding_error: The same of rounding the kept values.
        edited: Steps before which something other than an optimizer changed the weights.
        world_size: Ranks that recorded.
        settings: How deltas were selected and written.
        data: What is known of the dataset.
        runs: Training runs.
        states: Known weights.
        entries: Subtractions.
        missing_ranks: Ranks that recorded on other nodes, and whose parts are not joined yet; until then the figures
            above are those of the steps that every rank has here.
    """

    url: str
    store_id: str
    format_versions: tuple[int, ...]
    steps: int
    stored: int
    bytes: int
    bytes_per_kept: float
    kept: int
    distinct_ids: int
    seconds: float
    pruning_error: float | None
    rounding_error: float | None
    edited: int
    world_size: int
    settings: RecordingSettings
    data: DataFingerprint
    runs: tuple[Run, ...]
    states: tuple[ModelState, ...]
    entries: tuple[LedgerEntry, ...]
    missing_ranks: tuple[int, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, for a table."""
        settings = self.settings
        keep = f"{settings.keep:g}" + (" with overrides" if settings.keep_overrides else "")
        deltas = f"{self.stored:,}" + (f" ({self.bytes_per_kept:.2f} bytes per kept weight)" if self.kept else "")
        missing = ", ".join(map(str, self.missing_ranks))
        lacking = f"rank {missing}: `lightning-unlearn store join {self.url} PART ...` brings them here"
        return [
            ("store", f"{self.url} ({self.store_id})"),
            ("format version", " and ".join(map(str, self.format_versions))),
            ("steps", f"{self.steps:,} on {self.world_size} rank{'s' * (self.world_size != 1)}"),
            *([("missing parts", lacking)] if missing else []),
            ("deltas", deltas),
            ("size", f"{self.bytes / 1e6:,.2f} MB"),
            ("keep", f"{keep}, {settings.criterion}, by {settings.scope}"),
            ("values", f"{settings.value_dtype}, {settings.compression or 'not compressed'}"),
            ("error of pruning", _median(self.pruning_error)),
            ("error of rounding", _median(self.rounding_error)),
            ("steps after an edit", f"{self.edited:,}"),
            ("sample ids", f"{self.distinct_ids:,} by {self.data.identity}"),
            ("training time", f"{self.seconds:,.1f} s"),
            ("runs", ", ".join(f"{run.kind} from step {run.first}" for run in self.runs) or "none"),
            ("known weights", f"{len(self.states)}"),
            ("edits", f"{len(self.entries)}"),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{label}: {value}" for label, value in self.rows())


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged or missing file.

    Attributes:
        file: Its name in the store.
        problem: What is wrong with it.
        steps: Steps whose delta is lost.
        lost_ids: Steps whose ids are lost as well.
        repairable: Whether `DeltaStore.repair` can do without the lost part.
    """

    file: str
    problem: str
    steps: tuple[int, ...] = ()
    lost_ids: tuple[int, ...] = ()
    repairable: bool = True


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """What a check of every byte found.

    Attributes:
        url: The store.
        files: Number of files checked.
        steps: Number of steps checked, over all ranks.
        damages: What is damaged or missing.
        orphans: Files that nothing refers to: left by a crash, removed by the next writer. Not damage.
    """

    url: str
    files: int
    steps: int
    damages: tuple[Damage, ...]
    orphans: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages

    @property
    def damaged_steps(self) -> tuple[int, ...]:
        """Every step that lost its delta, ascending."""
        return tuple(sorted({step for damage in self.damages for step in damage.steps}))

    def __str__(self) -> str:
        head = f"{self.url}: {self.files} files and {self.steps} steps checked, "
        if self.ok:
            return head + "nothing damaged"
        lines = [
            f"  {damage.file}: {damage.problem}"
            + (f"; steps {shorten(damage.steps)} lost" if damage.steps else "")
            + (f", the ids of {shorten(damage.lost_ids)} as well" if damage.lost_ids else "")
            + ("" if damage.repairable else "; cannot be repaired: try again, or restore it from a copy")
            for damage in self.damages
        ]
        return "\n".join([f"{head}{len(self.damages)} damaged", *lines])
