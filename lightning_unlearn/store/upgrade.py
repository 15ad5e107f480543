"""Rewriting a store of an older format version in the current one."""

from __future__ import annotations

from collections.abc import Callable

from lightning_unlearn.exceptions import StoreCorruptedError
from lightning_unlearn.store.commits import CommitLog
from lightning_unlearn.store.documents import FORMAT_VERSION, document_version, from_document, to_document
from lightning_unlearn.store.maintenance import check_segment
from lightning_unlearn.store.opening import load_segment
from lightning_unlearn.store.rewrite import rewrite_segment
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.files import Files

__all__ = ["upgrade_store"]


def upgrade_store(
    files: Files, store_id: str, world_size: int, document: str, upgrade_lineage: Callable[[], object]
) -> int:
    """Rewrite every older segment, then the lineage, then the document that says what the store is.

    Each segment is read with all its checksums, written, read back, and put in place by a commit of its own, so the
    store can be read at every moment, and an upgrade that was interrupted goes on where it was. A store of the current
    version is left as it is.

    Args:
        files: The store's directory.
        store_id: The store's id.
        world_size: Number of ranks.
        document: Name of the document that says what the store is.
        upgrade_lineage: Writes the lineage anew.

    Returns:
        Number of segments that were rewritten.

    Raises:
        StoreMismatchError: a writer is open.
        StoreCorruptedError: a segment is damaged; repair the store first.
    """
    data, rewritten = files.read(document), 0
    if document_version(data) == FORMAT_VERSION:
        return 0
    for rank in range(world_size):
        log = CommitLog(files, store_id, rank)
        try:
            for place, ref in enumerate(log.head.segments):
                if load_segment(files, log.directory, ref).version == FORMAT_VERSION:
                    continue
                new = rewrite_segment(files, log, store_id, ref)
                if (damage := check_segment(files, log.directory, new)) is not None:
                    remedy = "The disk did not keep what was written; nothing was replaced."
                    raise StoreCorruptedError(expected(damage.file, "as it was written", damage.problem, remedy))
                segments = log.head.segments
                log.commit((*segments[:place], new, *segments[place + 1 :]))
                log.clean()
                rewritten += 1
        finally:
            log.release()
    upgrade_lineage()
    files.publish(document, to_document("store", from_document("store", f"{files.url}/{document}", data)))
    return rewritten
