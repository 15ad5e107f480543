"""The commit protocol of one rank: which segments are live is said by the newest commit file, and by nothing else.

A commit is created exclusively under the next number, so of two writers one fails, loudly, whatever the file system.
Taking over a rank's directory makes a commit as well: whoever wrote there before fails at its next publication, and
only then are files removed that no commit refers to.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from filelock import FileLock, Timeout

from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.documents import from_document, to_document
from lightning_unlearn.store.segment import SegmentRef
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.file_views import Raw
from lightning_unlearn.utilities.files import Files

__all__ = ["AnchorRef", "Commit", "CommitLog", "commit_numbers", "rank_directory", "read_commit"]

_COMMIT = re.compile(r"commit-(\d{8,})\.json")
_LOCK = "writer.lock"
_ATTEMPTS = 5
_REPAIR = "`DeltaStore.open(url, check=False).repair()` finds the segments again."


@dataclass(frozen=True, slots=True)
class AnchorRef:
    """What a commit says of one anchor.

    Attributes:
        name: File name in the rank's directory.
        step: Number of steps that its weights contain: the first `step` ones.
        bytes: Size of the file.
        digest: BLAKE2b of the file.
    """

    name: str
    step: int
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Commit:
    """One state of a rank's part of the store; number 0 is the empty one before any commit."""

    number: int
    segments: tuple[SegmentRef, ...]
    anchors: tuple[AnchorRef, ...] = ()

    @property
    def n_steps(self) -> int:
        """Number of steps it holds."""
        return self.segments[-1].stop if self.segments else 0


def rank_directory(rank: int) -> str:
    """Name of a rank's directory in the store.

    >>> rank_directory(3)
    'rank-00003'
    """
    return f"rank-{rank:05d}"


def _commit_name(number: int) -> str:
    return f"commit-{number:08d}.json"


def commit_numbers(names: Iterable[str]) -> list[int]:
    """Numbers of the commits among the names of files, ascending."""
    return sorted(int(match[1]) for name in names if (match := _COMMIT.fullmatch(name)))


def _parse(body: dict[str, Any], name: str, store_id: str, rank: int) -> Commit:
    found = (body["store_id"], body["rank"])
    if found != (store_id, rank):
        raise StoreMismatchError(expected(name, f"of store and rank {(store_id, rank)}", found, "Do not mix stores."))
    segments = tuple(SegmentRef(**segment) for segment in body["segments"])
    commit = Commit(int(body["number"]), segments, tuple(AnchorRef(**anchor) for anchor in body.get("anchors", ())))
    bounds = [0, *(segment.stop for segment in commit.segments)]
    if [segment.start for segment in commit.segments] != bounds[:-1]:
        raise StoreCorruptedError(expected(name, "a list of adjoining segments", body["segments"], _REPAIR))
    if any(anchor.step > commit.n_steps for anchor in commit.anchors):
        rule = f"anchors within its {commit.n_steps} steps"
        raise StoreCorruptedError(expected(name, rule, body["anchors"], _REPAIR))
    return commit


def read_commit(files: Files, store_id: str, rank: int) -> Commit:
    """The newest commit of a rank.

    Raises:
        StoreCorruptedError: it is damaged.
        StoreMismatchError: it belongs to another store, rank or format version.
    """
    directory = rank_directory(rank)
    for attempt in range(_ATTEMPTS):
        names = files.names(directory)
        numbers = commit_numbers(names)
        if not numbers:
            if any(name.startswith("segment-") for name in names):  # a writer commits before its first segment
                raise StoreCorruptedError(expected(directory, "a directory with a commit", "segments only", _REPAIR))
            return Commit(0, ())
        name = f"{directory}/{_commit_name(numbers[-1])}"
        try:
            data = files.read(name)
        except FileNotFoundError:  # a writer replaced it between the listing and the reading
            if attempt + 1 < _ATTEMPTS:
                continue
            raise
        return _parse(from_document("commit", name, data), name, store_id, rank)
    raise StoreCorruptedError(expected(directory, "a directory with a readable commit", "none", _REPAIR))


class CommitLog:
    """The right to write to one rank's directory.

    Args:
        files: The store's directory.
        store_id: The store's id.
        rank: The rank.
        head: The commit to go on from; the newest one unless it is given, which only a repair does.

    Raises:
        StoreMismatchError: another writer of this machine holds the lock.
    """

    def __init__(self, files: Files, store_id: str, rank: int, head: Commit | None = None) -> None:
        self._files = files
        self._store_id = store_id
        self.rank = rank
        self.directory = rank_directory(rank)
        self._lock: FileLock | None = None
        if files.is_local:
            self._lock = FileLock(files.path(f"{self.directory}/{_LOCK}"), timeout=0, thread_local=False)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise self._another("the lock is held") from error
        try:
            self.head = head or read_commit(files, store_id, rank)
            self.commit(self.head.segments)
            self.clean()
        except BaseException:
            self.release()
            raise

    def _another(self, got: str) -> StoreMismatchError:
        name = f"{self._files.url}/{self.directory}"
        return StoreMismatchError(
            expected(name, "written by one writer", f"another writer: {got}", "Close it, or use another store.")
        )

    def segment_name(self) -> str:
        """A name that no segment had before."""
        return f"segment-{self.head.number + 1:08d}-{secrets.token_hex(4)}.safetensors"

    def anchor_name(self, step: int) -> str:
        """A name that no anchor had before."""
        return f"anchor-{step:08d}-{secrets.token_hex(4)}.safetensors"

    def publish_segment(self, ref: SegmentRef | AnchorRef, chunks: Sequence[Raw]) -> None:
        """Write a segment or an anchor; it is live only once a commit lists it."""
        self._files.publish(f"{self.directory}/{ref.name}", chunks, exclusive=True)

    def commit(self, segments: Iterable[SegmentRef], anchors: Iterable[AnchorRef] | None = None) -> None:
        """Make `segments` and `anchors` the live ones; older commits are removed.

        Args:
            segments: Segments that adjoin each other from step 0 on.
            anchors: Anchors; those of the last commit unless given. One that lies behind the last step is left out.

        Raises:
            StoreMismatchError: another writer has made a commit since.
        """
        commit = Commit(self.head.number + 1, tuple(segments))
        wanted = self.head.anchors if anchors is None else tuple(anchors)
        commit = replace(commit, anchors=tuple(anchor for anchor in wanted if anchor.step <= commit.n_steps))
        body = {
            "store_id": self._store_id,
            "rank": self.rank,
            "number": commit.number,
            "segments": [asdict(segment) for segment in commit.segments],
            "anchors": [asdict(anchor) for anchor in commit.anchors],
        }
        name = f"{self.directory}/{_commit_name(commit.number)}"
        try:
            self._files.publish(name, to_document("commit", body), exclusive=True)
        except FileExistsError as error:
            raise self._another(f"it made commit {commit.number} first") from error
        numbers = commit_numbers(self._files.names(self.directory))
        if numbers[-1] != commit.number:  # ours slipped into a gap that the other's cleaning had left
            self._files.delete(name)
            raise self._another(f"it is at commit {numbers[-1]} already")
        self.head = commit
        for number in numbers[:-1]:
            self._files.delete(f"{self.directory}/{_commit_name(number)}")

    def discard(self, refs: Iterable[SegmentRef | AnchorRef]) -> None:
        """Remove files whose commit has just failed, if it certainly did: on a full disk they would take the last room.

        Elsewhere than on a local disk a commit may still turn up, so there they are left to the next writer.
        """
        if self._files.is_local and not self._files.exists(f"{self.directory}/{_commit_name(self.head.number + 1)}"):
            for ref in refs:
                with suppress(OSError):
                    self._files.delete(f"{self.directory}/{ref.name}")

    def clean(self) -> None:
        """Remove what no commit refers to, for good: unpublished files, and segments that were dropped or replaced."""
        segments = {segment.name for segment in self.head.segments}
        live = segments | {anchor.name for anchor in self.head.anchors} | {_commit_name(self.head.number), _LOCK}
        removed = [name for name in self._files.names(self.directory) if name not in live]
        for name in removed:
            self._files.delete(f"{self.directory}/{name}")
        if removed:
            self._files.sync(self.directory)

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.release()
