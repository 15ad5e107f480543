"""The weights of a checkpoint in a module: a file, or the folder that several processes wrote their shards into."""

from __future__ import annotations

import inspect
import io
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.files import Files

__all__ = ["load_weights", "read_named"]

_METADATA, _EXTRAS = ".metadata", "meta.pt"
"""What torch and Lightning add to the shards: where which tensor is, and what of the checkpoint is no tensor."""

_ROOTS = ("state_dict.", "model.")
"""What `ModelParallelStrategy` and `FSDPStrategy` put before a parameter's name."""

_SAVE_ALONE = "Save what is needed alone: torch.save({'state_dict': model.state_dict()}, path)."


def read_named(argument: str, path: str, rule: str) -> bytes:
    """The content of a file that an argument names.

    Raises:
        FileNotFoundError: there is no such file; the message says what the argument has to be.
    """
    files, name = Files(path).sibling("")
    try:
        return files.read(name)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(expected(argument, rule, path, f"It is not there, seen from {os.getcwd()}.")) from error


def load_weights(model: LightningModule, checkpoint: str | os.PathLike[str]) -> None:
    """Put the weights of a checkpoint into a module, as Lightning does; nothing in the files is run.

    A checkpoint is a file, or a folder: `ModelParallelStrategy(save_distributed_checkpoint=True)` and
    `FSDPStrategy(state_dict_type="sharded")` have every process write its shards. A folder's weights are put together
    in this process, which needs neither a process group nor as many processes as wrote it.

    Args:
        model: The module, not sharded; changed in place. As strict as its `strict_loading` says (it says yes).
        checkpoint: A Lightning checkpoint: the local path or fsspec URL of a file, or the local path of a folder.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds other things than plain values and tensors, it has no weights of a module, or they are not
            those of this module.

    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> saved, model = BoringModel(), BoringModel()
    >>> buffer = io.BytesIO()
    >>> torch.save({"state_dict": saved.state_dict()}, buffer)
    >>> Files("memory://doc-weights").publish("last.ckpt", buffer.getvalue())
    >>> load_weights(model, "memory://doc-weights/last.ckpt")
    >>> torch.equal(model.layer.weight, saved.layer.weight)
    True
    """
    path = os.fspath(checkpoint)
    content = _from_folder(Path(path)) if os.path.isdir(path) else _from_file(path)
    model.on_load_checkpoint(dict(content))
    try:
        model.load_state_dict(content["state_dict"], strict=model.strict_loading)
    except RuntimeError as error:
        rule, got = f"that of a {type(model).__name__} with these arguments", f"{path} ({_one_line(error)})"
        raise ValueError(expected("checkpoint", rule, got, "Give `model` its class and arguments.")) from error


def _from_file(path: str) -> Mapping[str, Any]:
    content = _plain(read_named("checkpoint", path, "the path of a checkpoint"), path)
    if not isinstance(content, Mapping) or "state_dict" not in content:
        rule = "a Lightning checkpoint, with a `state_dict`"
        got = f"{path} ({type(content).__name__} without it)"
        raise ValueError(expected("checkpoint", rule, got, _SAVE_ALONE))
    return content


def _plain(data: bytes, name: str) -> Any:
    """What `torch.save` wrote, if nothing has to be run for it."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's advice is to run what is in the file
        got = f"{name} ({'it holds a ' + refused[1] if refused else 'which torch.save did not write'})"
        raise ValueError(
            expected("checkpoint", "a file that loads with weights_only=True", got, _SAVE_ALONE)
        ) from error


def _from_folder(folder: Path) -> dict[str, Any]:
    if not (folder / _METADATA).is_file():
        rule = "a file, or a folder of shards, in which torch.distributed.checkpoint has left a `.metadata`"
        raise ValueError(expected("checkpoint", rule, f"{folder}, a folder without it"))
    reader = _Reader(folder)
    listed = reader.read_metadata()
    known, paths = listed.state_dict_metadata, listed.planner_data or {}
    root = next((root for root in _ROOTS if any(name.startswith(root) for name in known)), None)
    if root is None:
        rule = "one of Lightning's, with the weights under `state_dict` or `model`"
        raise ValueError(expected("checkpoint", rule, f"{folder} ({shorten(known)})"))
    # The names that are asked for are all that is read: not the optimizer's state, which may be twice as large.
    wanted: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, metadata.TensorStorageMetadata)
        else None
        for name, entry in known.items()
        if name.startswith(root)
    }
    _read_shards(wanted, reader, folder)
    extras = _plain((folder / _EXTRAS).read_bytes(), str(folder / _EXTRAS)) if (folder / _EXTRAS).is_file() else {}
    state: dict[Any, Any] = {}
    for name, value in wanted.items():
        # Mappings and lists in a state dict (a module's extra state) are taken apart when they are written.
        *outer, last = paths.get(name, ("", name.removeprefix(root)))[1:]
        place = state
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    return {**extras, "state_dict": {name: _with_lists(value) for name, value in state.items()}}


def _read_shards(wanted: dict[str, Any], reader: FileSystemReader, folder: Path) -> None:
    """Fill tensors from the shards, in this process alone."""
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    alone = {"no_dist": True} if "no_dist" in inspect.signature(load).parameters else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            load(wanted, storage_reader=reader, planner=planner, **alone)
        except CheckpointException as error:  # which is no `Exception`
            cause = next((one for one, _ in error.failures.values()), error)
            rule, got = "a folder with all of its shards, of plain tensors", f"{folder} ({_one_line(cause)})"
            raise ValueError(expected("checkpoint", rule, got)) from error


def _with_lists(value: Any) -> Any:
    """A nested mapping, in which the numbered ones are lists."""
    if not isinstance(value, dict):
        return value
    inner = {key: _with_lists(one) for key, one in value.items()}
    return [inner[place] for place in range(len(inner))] if inner and set(inner) == set(range(len(inner))) else inner


class _Reader(FileSystemReader):
    """Reads shards without running what is pickled in the list of them."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """As the base class, which would import and call whatever the file names."""
        name = Path(self.path) / _METADATA
        with name.open("rb") as file:
            try:
                found: metadata.Metadata = _OfMetadata(file).load()
            except (pickle.UnpicklingError, EOFError) as error:
                rule = "a list of shards that torch.distributed.checkpoint wrote"
                raise ValueError(expected("checkpoint", rule, f"{name} ({error})")) from error
        found.storage_meta = getattr(found, "storage_meta", None) or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _OfMetadata(pickle.Unpickler):
    _ALLOWED = (
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(("pathlib", name) for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath")),
    )

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Classes that describe shards, sizes, dtypes and paths."""
        allowed = (module_name, global_name) in self._ALLOWED
        if module_name == "torch":
            allowed |= isinstance(getattr(torch, global_name, None), torch.dtype)
        if module_name == metadata.__name__:
            found = vars(metadata).get(global_name)
            allowed |= isinstance(found, type) and found.__module__ == module_name
        if not allowed:
            raise pickle.UnpicklingError(f"it holds a {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


class _Planner(DefaultLoadPlanner):
    """Puts what is no tensor (a module's extra state) where tensors are put, if nothing has to be run for it."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """As the base class, which would run what is pickled."""
        state: dict[str, Tensor | Any] = self.state_dict
        state[read_item.dest_index.fqn] = _plain(value.read(), read_item.dest_index.fqn)


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]} ..."
