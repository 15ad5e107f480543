"""Parts of a store on other nodes: where ranks do not see what rank 0 made, their node keeps a part of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from filelock import FileLock

from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.documents import to_document
from lightning_unlearn.store.store_documents import STORE
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.files import Files

__all__ = ["open_here", "part_body"]

_SAME_NODES = (
    "Start the ranks on the nodes that have their parts, or join the parts (`lightning-unlearn store join`) and record "
    "into the joined store."
)


def part_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """What `store.json` of a part says, from what that of the store says.

    >>> part_body({"store_id": "1f", "world_size": 2})
    {'store_id': '1f', 'world_size': 2, 'part': True}
    """
    return {**body, "part": True}


def open_here(url: str | os.PathLike[str], body: Mapping[str, Any], rank: int, *, begins: bool) -> DeltaStore:
    """The store that rank 0 has opened, or this node's part of it, as a rank finds it at its own `url`.

    A part is made where there is none yet. Several ranks of a node may do this at once: they take turns, so that the
    first one makes the part, and the others find it. A part in which nothing was recorded, and which belongs to
    another store, is replaced, as `DeltaRecorder` does with such a store.

    Args:
        url: Where the rank records: the same string on every rank, and not always the same place.
        body: What the `store.json` says that rank 0 has opened.
        rank: The rank.
        begins: Whether no step was recorded yet, so that there may be no part.

    Raises:
        StoreMismatchError: something else is there; or nothing is, and steps are needed, or it is a URL at which every
            rank should have found the store.
    """
    files = Files(url)
    name = f"store of rank {rank}"
    rule = f"store {body['store_id']}, which rank 0 has opened"
    files.names()  # so that a cache learns what another node has just made
    found = _found(url, files)
    if found is not None and found.store_id == body["store_id"]:
        return found
    got = f"nothing at {files.url!r}" if found is None else f"store {found.store_id} at {files.url!r}"
    if not files.is_local:
        remedy = "Give every rank access to one place, or use a path that is local to each node."
        raise StoreMismatchError(expected(name, rule, got, remedy))
    if not begins:
        raise StoreMismatchError(expected(name, f"{rule}, or a part of it", got, _SAME_NODES))
    if found is not None and not found.is_blank:
        remedy = "Remove it if it is of no use any more, or record into a new directory."
        raise StoreMismatchError(expected(name, f"{rule}, or a place for a part of it", got, remedy))
    with FileLock(files.path(f"{STORE}.lock")):
        return _made(url, files, body)


def _found(url: str | os.PathLike[str], files: Files) -> DeltaStore | None:
    return DeltaStore.open(url, check=False) if files.exists(STORE) else None


def _made(url: str | os.PathLike[str], files: Files, body: Mapping[str, Any]) -> DeltaStore:
    """The part; whoever holds the lock looks again, because another rank of the node may have made it meanwhile."""
    found = _found(url, files)
    if found is not None and found.store_id != body["store_id"]:
        # A name that nobody can have asked for before: no cache can have kept that it was not there.
        if files.exists(body["initial_file"]):
            remedy = "The file system shows an older state: start again."
            raise StoreMismatchError(expected("store", f"store {body['store_id']}", found.store_id, remedy))
        found.discard_empty()
        found = None
    if found is None:
        try:
            files.publish(STORE, to_document("store", part_body(body)), exclusive=True)
        except FileExistsError:  # by rank 0, on a shared file system that had not shown it yet
            return _same(DeltaStore.open(url, check=False), body)
        found = DeltaStore.open(url, check=False)
    return found


def _same(store: DeltaStore, body: Mapping[str, Any]) -> DeltaStore:
    if store.store_id != body["store_id"]:
        remedy = "Record every run into a directory of its own."
        raise StoreMismatchError(expected("store", f"store {body['store_id']}", f"store {store.store_id}", remedy))
    return store
