"""Where a SISA training keeps its manifest and its checkpoints."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.shards.manifest import SisaManifest
from lightning_unlearn.store.documents import from_document, to_document
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.files import TEMPORARY_PREFIX, Files

__all__ = ["SisaFolder"]

_MANIFEST = "sisa.json"
_SHARD = re.compile(r"shard-\d+")
# Nothing else is ever removed, whatever a user keeps in the same folder.
_CHECKPOINT = r"(start|slice-\d+)-[0-9a-f]{32}\.ckpt"
_OURS = re.compile(rf"{_CHECKPOINT}|{re.escape(TEMPORARY_PREFIX)}({_CHECKPOINT}|{re.escape(_MANIFEST)})-[0-9a-f]+")


class SisaFolder:
    """The files of one SISA training; one process at a time may change them.

    A file is there wholly or not at all. The manifest says which checkpoints there should be; a deletion is one new
    manifest, then the trainings it asks for, then the removal of what it no longer names. So whatever stops a process,
    the next one finds out from the folder what is left to do.

    Args:
        url: A local path or an fsspec URL.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self._files = Files(url)
        self.url = self._files.url

    @property
    def exists(self) -> bool:
        """Whether a training was begun here."""
        return self._files.exists(_MANIFEST)

    def manifest(self) -> SisaManifest:
        """The manifest.

        Raises:
            MissingRequirementError: there is no training here.
            StoreCorruptedError: the manifest is damaged.
        """
        if not self.exists:
            rule, remedy = "the folder of a SISA training", "Train with `SisaTraining(folder, ...).fit(data)` first."
            raise MissingRequirementError(expected("folder", rule, self.url, remedy))
        return SisaManifest.from_body(from_document("sisa", _MANIFEST, self._files.read(_MANIFEST)))

    def write(self, manifest: SisaManifest) -> None:
        """Make this the manifest."""
        self._files.publish(_MANIFEST, to_document("sisa", manifest.to_body()))

    def has(self, name: str) -> bool:
        """Whether a checkpoint is there."""
        return self._files.exists(name)

    def save(self, name: str, checkpoint: bytes) -> None:
        """Write a checkpoint."""
        self._files.publish(name, checkpoint)

    def load(self, name: str, *, weights_only: bool) -> Mapping[str, Any]:
        """Read a checkpoint, to the CPU."""
        content: Mapping[str, Any] = torch.load(
            io.BytesIO(self._files.read(name)), map_location="cpu", weights_only=weights_only
        )
        return content

    def stale(self, manifest: SisaManifest) -> list[str]:
        """Files that a manifest does not name: results that saw deleted samples, and what a killed process left."""
        named = self.named(manifest)
        top = self._files.names()
        found = [f"{folder}/{name}" for folder in top if _SHARD.fullmatch(folder) for name in self._files.names(folder)]
        ours = [one for one in [*top, *found] if _OURS.fullmatch(one.rpartition("/")[2])]
        return [one for one in ours if one not in named]

    def missing(self, manifest: SisaManifest) -> list[str]:
        """Checkpoints that a manifest names and that are not there."""
        return sorted(one for one in self.named(manifest) if not self.has(one))

    def named(self, manifest: SisaManifest) -> Collection[str]:
        """Checkpoints that a manifest names."""
        stages = manifest.stages()
        return {manifest.first_checkpoint(shard) for shard in stages} | {
            stage.name for trained in stages.values() for stage in trained
        }

    def sweep(self, manifest: SisaManifest) -> None:
        """Remove what a manifest does not name, for good."""
        stale = self.stale(manifest)
        for name in stale:
            self._files.delete(name)
        for folder in sorted({name.rpartition("/")[0] for name in stale}):
            self._files.sync(folder)
