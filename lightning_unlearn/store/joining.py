"""Bringing the parts of a store together that ranks recorded on other nodes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.commits import AnchorRef, Commit, CommitLog, rank_directory, read_commit
from lightning_unlearn.store.documents import FORMAT_VERSION, from_document, to_document
from lightning_unlearn.store.maintenance import check_anchor, check_segment
from lightning_unlearn.store.opening import load_segment, whole_file
from lightning_unlearn.store.segment import SegmentRef
from lightning_unlearn.store.store_documents import STORE
from lightning_unlearn.store.view import StoreView
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.files import Files

__all__ = ["Joined", "join_parts", "record_checksums"]


@dataclass(frozen=True, slots=True)
class Joined:
    """What a call of `join_parts` did.

    Attributes:
        url: The store.
        ranks: Ranks of which steps were copied, ascending; none where everything was there already.
        files: Number of files that were copied.
        bytes: Their size.
        missing_ranks: Ranks whose parts are still to be joined.
    """

    url: str
    ranks: tuple[int, ...]
    files: int
    bytes: int
    missing_ranks: tuple[int, ...]

    def __str__(self) -> str:
        what = f"{self.files:,} files of {len(self.ranks)} ranks copied ({self.bytes / 1e6:,.2f} MB)"
        missing = ", ".join(map(str, self.missing_ranks))
        state = f"still missing: the parts of rank {missing}" if missing else f"{self.url} is whole"
        return f"{what if self.ranks else 'Nothing to copy'}; {state}"


@dataclass(frozen=True, slots=True)
class _Copy:
    """One rank's steps: where they come from, and what the store had of them before."""

    rank: int
    source: StoreView
    commit: Commit
    before: Commit


def record_checksums(files: Files, store_id: str, commit: Commit, rank: int) -> npt.NDArray[np.uint32]:
    """The checksum of every record of a rank: what its steps were, however they are spread over segments.

    Raises:
        StoreCorruptedError: a head is damaged.
    """
    heads = [load_segment(files, rank_directory(rank), ref) for ref in commit.segments]
    return np.concatenate([np.empty(0, np.uint32), *(head.columns["record_crc32"] for head in heads)])


def join_parts(url: str | os.PathLike[str], parts: Sequence[str | os.PathLike[str]]) -> Joined:
    """Copy what ranks recorded on other nodes into a store; the parts themselves are left as they are.

    Every file is checked before and after it is copied. A rank's steps become part of the store in one commit, behind
    all of their files: whenever it is interrupted the store can be opened, and joining again finishes it. What is there
    already is not copied again, so nothing happens where nothing is new; of a rank that has gone on since it was
    joined, the steps behind are brought.

    Args:
        url: What rank 0 recorded into, or a copy of it; any fsspec URL. Where nothing is yet, one of `parts` must be
            what rank 0 recorded into, and is copied as well.
        parts: The directories of other nodes, as far as they can be reached from here; any fsspec URLs.

    Returns:
        What was copied, and what is still missing.

    Raises:
        StoreMismatchError: one of them is of another store, has other steps of a rank than another one has, or is
            being written to; nothing was copied.
        StoreCorruptedError: a file of a part is damaged; nothing of its rank was copied.
    """
    target = Files(url)
    sources = [StoreView(Files(part)) for part in parts]
    known = StoreView(target) if target.exists(STORE) else None
    whole = known or next((source for source in sources if not source.is_part), None)
    if whole is None:
        got = "parts only" if sources else "none"
        remedy = "Join into what rank 0 recorded into, or name that among the parts."
        raise StoreMismatchError(expected("parts", f"one with rank 0's, as no store is at {target.url!r}", got, remedy))
    documents = {} if known is not None else _documents(whole)
    _ = whole.lineage  # which a part does not have
    for source in sources:
        _check_same(whole, source)
    copies = _plan(target, whole, sources)
    newer = next((copy.source.url for copy in copies if known is not None and not copy.source.is_part), None)
    if newer is not None:
        remedy = "Its lineage cannot be joined to another: join the parts into it, or all of them into a new place."
        raise StoreMismatchError(expected("parts", "parts of other nodes than rank 0's", f"the store {newer}", remedy))
    for name, data in documents.items():
        target.publish(name, data)
    copied = [one for copy in copies for one in _copy(target, copy)]
    if known is None:
        target.publish(STORE, to_document("store", whole.body), exclusive=True)
    joined = StoreView(target)
    ranks = tuple(copy.rank for copy in copies)
    return Joined(target.url, ranks, len(copied), sum(ref.bytes for ref in copied), joined.missing_ranks)


def _documents(store: StoreView) -> dict[str, bytes]:
    """Lineage, weights and layouts of a store, checked; read before its commits, which may be newer but not older."""
    store.initial_weights()
    _ = store.pieces
    lineage = store.files.read(store.lineage_file)
    from_document("lineage", f"{store.url}/{store.lineage_file}", lineage)
    names = [store.initial_file, *(name for name, _ in (*store.lineage.initial, *store.lineage.layouts))]
    return {**{name: store.files.read(name) for name in names}, store.lineage_file: lineage}


def _check_same(store: StoreView, part: StoreView) -> None:
    remedy = "Join parts of one recording only."
    if part.store_id != store.store_id:
        got = f"a part of store {part.store_id}"
        raise StoreMismatchError(expected(part.url, f"a part of store {store.store_id}", got, remedy))
    ours, theirs = ({name: one for name, one in view.body.items() if name != "part"} for view in (store, part))
    differing = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
    if differing:
        raise StoreMismatchError(expected(part.url, "recorded as the store was", f"other {differing}", remedy))
    for view in (store, part):
        if view.version != FORMAT_VERSION:
            rule = f"of format version {FORMAT_VERSION} to be joined"
            remedy = f"Run `lightning-unlearn store upgrade {view.url}` first."
            raise StoreMismatchError(expected(view.url, rule, f"version {view.version}", remedy))


def _plan(target: Files, store: StoreView, parts: Sequence[StoreView]) -> list[_Copy]:
    """For every rank the part that has most of its steps; of two that have a step it must be the same one."""
    copies: list[_Copy] = []
    for rank in range(store.world_size):
        before = read_commit(target, store.store_id, rank)
        known = record_checksums(target, store.store_id, before, rank)
        place, best = target.url, None
        for part in parts:
            commit = read_commit(part.files, store.store_id, rank)
            found = record_checksums(part.files, store.store_id, commit, rank)
            common = min(len(known), len(found))
            other = np.flatnonzero(known[:common] != found[:common])
            if other.size:
                got = f"another step {other[0]} of rank {rank} than in {place}"
                remedy = "One of them was purged, repaired, or continued from an earlier checkpoint: join the other."
                raise StoreMismatchError(expected(part.url, "a part with the store's steps", got, remedy))
            if len(found) > len(known):
                known, place, best = found, part.url, _Copy(rank, part, commit, before)
        if best is not None:
            copies.append(best)
    return copies


def _copy(target: Files, copy: _Copy) -> list[SegmentRef | AnchorRef]:
    """Copy one rank's files, and then make them live in one commit; returns what was copied."""
    source, directory = copy.source.files, rank_directory(copy.rank)
    held = copy.before.n_steps
    # Of steps that are here already a purge may have removed the anchors.
    anchors = [ref for ref in copy.commit.anchors if ref.step > held]
    wanted: list[SegmentRef | AnchorRef] = [*copy.commit.segments, *anchors]
    new = [ref for ref in wanted if ref not in copy.before.segments]
    for ref in new:
        _check_source(copy, ref)
    log = CommitLog(target, copy.source.store_id, copy.rank)
    try:
        if (log.head.segments, log.head.anchors) != (copy.before.segments, copy.before.anchors):
            got = f"another state of rank {copy.rank} than a moment ago"
            raise StoreMismatchError(expected(target.url, "joined by one process at a time", got, "Join it again."))
        for ref in new:
            log.publish_segment(ref, [whole_file(source, f"{directory}/{ref.name}")(0, ref.bytes)])
            _check(target, directory, ref, "The disk did not keep what was written: join it again.")
        log.commit(copy.commit.segments, (*copy.before.anchors, *anchors))
        log.clean()
    except OSError:
        log.discard(new)
        raise
    finally:
        log.release()
    return new


def _check(files: Files, directory: str, ref: SegmentRef | AnchorRef, remedy: str) -> None:
    damage = (
        check_segment(files, directory, ref) if isinstance(ref, SegmentRef) else check_anchor(files, directory, ref)
    )
    if damage is not None:
        raise StoreCorruptedError(expected(f"{files.url}/{damage.file}", "intact", damage.problem, remedy))


def _check_source(copy: _Copy, ref: SegmentRef | AnchorRef) -> None:
    files = copy.source.files
    remedy = f"`DeltaStore.open({files.url!r}, check=False).repair()` drops what is damaged and keeps the rest."
    try:
        _check(files, rank_directory(copy.rank), ref, remedy)
    except StoreCorruptedError as error:
        if read_commit(files, copy.source.store_id, copy.rank) == copy.commit:
            raise
        got = "one that a recording is writing to"
        raise StoreMismatchError(expected(files.url, "a part that is complete", got, "Join it afterwards.")) from error
