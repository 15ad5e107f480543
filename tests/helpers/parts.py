"""Stores in several places: parts as other nodes have them, and a file system without locks that processes share."""

import os
import shutil
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem

from lightning_unlearn.store.commits import rank_directory
from lightning_unlearn.store.documents import to_document
from lightning_unlearn.store.parts import part_body
from lightning_unlearn.store.view import StoreView
from lightning_unlearn.utilities.files import Files


def move_to_part(store, part, *ranks):
    """Move ranks of a local store to a part of it, as if they had recorded on another node."""
    view = StoreView(Files(store))
    Files(part).publish("store.json", to_document("store", part_body(view.body)))
    for rank in ranks:
        shutil.move(Path(store) / rank_directory(rank), Path(part) / rank_directory(rank))
    return str(part)


def file_contents(folder):
    """Every file below a folder, and what is in it."""
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


class Shelf(AbstractFileSystem):
    """Stands in for an object store: whole objects, exclusive PUTs, no locks; several processes see the same one."""

    protocol = "shelf"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("shelf://").strip("/")

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        if not os.path.isdir(path):
            raise FileNotFoundError(path)
        entries = [
            {"name": entry.path, "size": entry.stat().st_size, "type": "directory" if entry.is_dir() else "file"}
            for entry in os.scandir(path)
            if not entry.name.startswith(".put-")
        ]
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        if not os.path.exists(path):
            raise FileNotFoundError(path)
        kind = "directory" if os.path.isdir(path) else "file"
        return {"name": path, "size": os.path.getsize(path), "type": kind}

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = Path(self._strip_protocol(path)).read_bytes()
        return data[start:end]

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        path = self._strip_protocol(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{os.path.dirname(path)}/.put-{os.getpid()}-{os.path.basename(path)}"
        Path(temporary).write_bytes(value)
        try:
            if mode == "create":
                os.link(temporary, path)
            else:
                os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def rm_file(self, path):
        os.unlink(self._strip_protocol(path))


def put_up_shelf():
    """Make `shelf://` URLs known to this process."""
    fsspec.register_implementation("shelf", Shelf, clobber=True)
