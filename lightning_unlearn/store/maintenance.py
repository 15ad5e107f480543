"""Checking every byte of a store, repairing it, and removing people from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from lightning_unlearn.exceptions import LightningUnlearnError, StoreCorruptedError
from lightning_unlearn.store.commits import AnchorRef, Commit, CommitLog, rank_directory, read_commit
from lightning_unlearn.store.documents import digest_of
from lightning_unlearn.store.info import Damage, VerificationReport
from lightning_unlearn.store.opening import corrupted, load_segment, whole_file
from lightning_unlearn.store.rewrite import first_touched, purge_segment
from lightning_unlearn.store.salvage import damages_of, open_damaged, salvage_commit, salvage_segment
from lightning_unlearn.store.segment import SegmentRef
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.file_views import DAMAGE
from lightning_unlearn.utilities.files import TEMPORARY_PREFIX, Files

__all__ = ["check_anchor", "check_segment", "purge", "repair", "total_bytes", "verify"]

_LOCKS = (".lock",)
_ATTEMPTS = 5


def total_bytes(files: Files, world_size: int) -> int:
    """Size of all files of a store."""
    directories = ["", *(f"{rank_directory(rank)}/" for rank in range(world_size))]
    names = [directory + name for directory in directories for name in files.names(directory.rstrip("/"))]
    return sum(files.size(name) for name in names if not name.startswith("rank-") or "/" in name)


def _unreadable(name: str, error: OSError) -> Damage:
    """What may be intact: a busy or unreachable disk is no reason for a repair to drop anything."""
    return Damage(name, f"not readable at the moment ({error})", repairable=False)


def check_segment(files: Files, directory: str, ref: SegmentRef) -> Damage | None:
    """What is damaged in a segment, read step by step in bounded memory; `None` where it is intact."""
    name = f"{directory}/{ref.name}"
    try:
        size = files.size(name)
        segment, intact = open_damaged(files, directory, ref)
    except FileNotFoundError:
        every = tuple(range(ref.start, ref.stop))
        return Damage(name, "missing", every, every)
    except OSError as error:
        return _unreadable(name, error)
    found = damages_of(segment, intact, ref)
    if size == ref.bytes and not found.parts:
        return None
    problem = "truncated" if size < ref.bytes else "longer than it was" if size > ref.bytes else "altered"
    parts = f" ({', '.join(found.parts)})" if found.parts else ""
    return Damage(name, problem + parts, tuple(found.steps), tuple(found.lost_ids))


def check_anchor(files: Files, directory: str, ref: AnchorRef) -> Damage | None:
    """What is wrong with an anchor; `None` where it is intact."""
    name = f"{directory}/{ref.name}"
    try:
        intact = files.size(name) == ref.bytes and digest_of(whole_file(files, name)(0, ref.bytes)) == ref.digest
    except FileNotFoundError:
        return Damage(name, "missing (anchor)")
    except OSError as error:
        return _unreadable(name, error)
    return None if intact else Damage(name, "altered (anchor)")


def _check_rank(files: Files, store_id: str, rank: int) -> tuple[Commit, list[Damage]]:
    """The newest commit of a rank, and what is damaged in its files."""
    directory = rank_directory(rank)
    for attempt in range(1, _ATTEMPTS + 1):
        commit = read_commit(files, store_id, rank)
        found = [
            *(check_segment(files, directory, ref) for ref in commit.segments),
            *(check_anchor(files, directory, ref) for ref in commit.anchors),
        ]
        damages = [damage for damage in found if damage is not None]
        # A writer that goes on may have merged what is missing here.
        if not damages or attempt == _ATTEMPTS or read_commit(files, store_id, rank) == commit:
            break
    return commit, damages


def verify(
    files: Files, store_id: str, world_size: int, documents: Mapping[str, Callable[[], object]]
) -> VerificationReport:
    """Read and check everything.

    Args:
        files: The store's directory.
        store_id: The store's id.
        world_size: Number of ranks.
        documents: Name -> what reads and checks it, raising where it is damaged.
    """
    damages, orphans, checked, steps = [], [], 1 + len(documents), 0
    for name, read in documents.items():
        try:
            read()
        except LightningUnlearnError as error:
            damages.append(Damage(name, str(error), repairable=False))
        except OSError as error:
            damages.append(_unreadable(name, error))
    known = {"store.json", *documents}
    orphans += [
        name
        for name in files.names()
        if name not in known and not name.startswith("rank-") and not name.endswith(_LOCKS)
    ]
    for rank in range(world_size):
        directory = rank_directory(rank)
        try:
            commit, found = _check_rank(files, store_id, rank)
        except (LightningUnlearnError, OSError) as error:
            damaged = isinstance(error, StoreCorruptedError)  # and not of a newer version, or out of reach
            repairable = damaged and salvage_commit(files, store_id, rank) is not None
            damages.append(Damage(directory, str(error), repairable=repairable))
            continue
        parts = [*(ref.name for ref in commit.segments), *(ref.name for ref in commit.anchors)]
        live = {f"commit-{commit.number:08d}.json", *parts}
        names = files.names(directory)
        orphans += [f"{directory}/{name}" for name in names if name not in live and not name.endswith(_LOCKS)]
        checked += len(parts) + (commit.number > 0)
        steps += commit.n_steps
        damages += found
    return VerificationReport(files.url, checked, steps, tuple(damages), tuple(orphans))


def repair(files: Files, store_id: str, world_size: int, report: VerificationReport) -> None:
    """Replace every damaged segment by what is left of it, and a damaged commit by what the segments tell.

    A damaged anchor is dropped, and with a damaged commit all anchors of the rank: nothing else vouched for them.
    """
    damaged = {damage.file for damage in report.damages if damage.repairable}
    for rank in range(world_size):
        directory = rank_directory(rank)
        if not any(name == directory or name.startswith(f"{directory}/") for name in damaged):
            continue
        head = salvage_commit(files, store_id, rank) if directory in damaged else None
        log = CommitLog(files, store_id, rank, head)
        try:
            log.commit(
                [
                    salvage_segment(files, log, store_id, ref)
                    if (f"{directory}/{ref.name}" in damaged if head is None else check_segment(files, directory, ref))
                    else ref
                    for ref in log.head.segments
                ],
                [ref for ref in log.head.anchors if f"{directory}/{ref.name}" not in damaged],
            )
            log.clean()
        finally:
            log.release()


def _touched(
    files: Files, log: CommitLog, ref: SegmentRef, sample_ids: Collection[SampleId], steps: Collection[int]
) -> int | None:
    segment = load_segment(files, log.directory, ref)
    try:
        return first_touched(segment, sample_ids, steps)
    except DAMAGE as error:
        raise corrupted(f"{log.directory}/{ref.name}", range(ref.start, ref.stop), error) from error


def purge(
    files: Files, store_id: str, world_size: int, sample_ids: Collection[SampleId], steps: Collection[int]
) -> None:
    """Remove ids from every step and the deltas of `steps`, over all ranks, and anchors that have learnt from them.

    Anchors go first, on every rank: as long as an id is still in a step, an interrupted purge can tell which ones.
    """
    logs: list[CommitLog] = []
    try:
        logs.extend(CommitLog(files, store_id, rank) for rank in range(world_size))
        touched = [[_touched(files, log, ref, sample_ids, steps) for ref in log.head.segments] for log in logs]
        first = min([*steps, *(step for part in touched for step in part if step is not None)], default=None)
        for log in logs:
            anchors = [ref for ref in log.head.anchors if first is None or ref.step <= first]
            if len(anchors) < len(log.head.anchors):
                log.commit(log.head.segments, anchors)
                log.clean()
        for log, part in zip(logs, touched, strict=True):
            segments = [
                ref if step is None else purge_segment(files, log, store_id, ref, sample_ids, steps)
                for ref, step in zip(log.head.segments, part, strict=True)
            ]
            if tuple(segments) != log.head.segments:
                log.commit(segments)
            log.clean()
    finally:
        for log in logs:
            log.release()
    for name in files.names():
        if name.startswith(TEMPORARY_PREFIX):
            files.delete(name)
