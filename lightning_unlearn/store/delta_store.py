"""The store of recorded deltas: one directory that knows which run, model and data it belongs to."""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace

from safetensors.torch import save as save_tensors
from torch import Tensor

from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.store.anchors import Anchor, anchor_steps, load_anchor
from lightning_unlearn.store.commits import rank_directory
from lightning_unlearn.store.compression import check_compression
from lightning_unlearn.store.documents import FORMAT_VERSION, digest_of, to_document
from lightning_unlearn.store.joining import Joined, join_parts
from lightning_unlearn.store.layout import pieces_to_dict, with_pieces
from lightning_unlearn.store.lineage import Lineage, Run, RunKind, lineage_to_dict
from lightning_unlearn.store.store_documents import STORE
from lightning_unlearn.store.upkeep import StoreUpkeep
from lightning_unlearn.store.writer import SEGMENT_BYTES, Background, StoreWriter
from lightning_unlearn.types import (
    DataFingerprint,
    LayerPiece,
    ModelSignature,
    ModelState,
    OptimizerInfo,
    RecordingSettings,
)
from lightning_unlearn.utilities.checks import check_positive_int, expected, shorten
from lightning_unlearn.utilities.files import Files
from lightning_unlearn.utilities.parameters import change_norm, tensors_digest

__all__ = ["DeltaStore"]


class DeltaStore(StoreUpkeep):
    """A store of deltas; made by `create` or `open`, written by `writer`, and read by everything else.

    Reading sees what was committed when the store was opened or last refreshed. Opening never needs the model.
    """

    @staticmethod
    def exists(url: str | os.PathLike[str]) -> bool:
        """Whether there is a store at `url`."""
        return Files(url).exists(STORE)

    @classmethod
    def create(
        cls,
        url: str | os.PathLike[str],
        *,
        signature: ModelSignature,
        settings: RecordingSettings,
        data: DataFingerprint,
        initial: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor] | None = None,
        world_size: int = 1,
    ) -> DeltaStore:
        """Make a new, empty store.

        Of two processes that do it at once one succeeds, and the other is told; nothing of its own stays.

        Args:
            url: Local path or fsspec URL, where no store is yet.
            signature: Names and shapes of the layers.
            settings: How deltas will be selected and written.
            data: What is known of the dataset.
            initial: Parameters and float buffers at the start, by name.
            frozen: Parameters that will not change: a digest is kept and not their values. See `add_initial`.
            world_size: Number of ranks that will write.

        Raises:
            StoreMismatchError: there is a store already, or `initial` does not fit the signature.
            MissingRequirementError: `compression="zstd"` without the package `zstandard`.
        """
        check_positive_int("world_size", world_size)
        check_compression(settings.compression)
        files = Files(url)
        if files.exists(STORE):
            raise StoreMismatchError(
                expected("url", "a place without a store", files.url, "Open it, or choose another place.")
            )
        shapes = {layer.name: layer.shape for layer in signature.layers}
        everything = {**initial, **(frozen or {})}
        if {name: tuple(tensor.shape) for name, tensor in everything.items()} != shapes:
            raise StoreMismatchError(expected("initial", "the tensors of the signature", shorten(everything)))
        weights = _to_bytes({name: initial[name] for name in initial if name not in (frozen or {})})
        parameters = {layer.name: everything[layer.name] for layer in signature.layers if layer.kind == "parameter"}
        # Names of its own for each attempt: whoever comes second to `store.json` has overwritten nothing.
        store_id = uuid.uuid4().hex
        initial_file, lineage_file = f"initial-{store_id[:12]}.safetensors", f"lineage-{store_id[:12]}.json"
        body = {
            "store_id": store_id,
            "world_size": world_size,
            "signature": [asdict(layer) for layer in signature.layers],
            "settings": asdict(settings),
            "data": asdict(data),
            "initial": digest_of(weights),
            "initial_file": initial_file,
            "lineage_file": lineage_file,
            "frozen": {name: tensors_digest({name: tensor}) for name, tensor in (frozen or {}).items()},
        }
        state = ModelState(tensors_digest(parameters), (), (), 0.0, change_norm(parameters))
        lineage = {"store_id": store_id, **lineage_to_dict(Lineage(states=(state,)))}
        files.publish(initial_file, weights)
        files.publish(lineage_file, to_document("lineage", lineage))
        try:
            files.publish(STORE, to_document("store", body), exclusive=True)
        except FileExistsError as error:
            for name in (initial_file, lineage_file):
                files.delete(name)
            remedy = "Record every run into a directory of its own."
            raise StoreMismatchError(
                expected("url", "written by one process", f"another store at {url}", remedy)
            ) from error
        for name in files.names():  # of attempts that did not get to their `store.json`
            if name.startswith(("initial-", "lineage-")) and name not in (initial_file, lineage_file):
                files.delete(name)
        return cls(files)

    def add_initial(self, tensors: Mapping[str, Tensor]) -> None:
        """Add initial values of parameters that were frozen as the store was made, and are about to be trained.

        Args:
            tensors: Their values, which must be what they were then; those that are there already are passed over.

        Raises:
            StoreMismatchError: a name was not frozen, or its values have changed since.
        """
        known = self.initial_weights()
        new = {name: tensor for name, tensor in tensors.items() if name not in known}
        self.check_unchanged(new)
        if new:
            weights = _to_bytes(new)
            digest = digest_of(weights)
            name = f"initial-{digest[:12]}.safetensors"
            self._files.publish(name, weights)
            added = (name, digest)
            self.update_lineage(lambda lineage: replace(lineage, initial=(*lineage.initial, added)))

    def add_pieces(self, pieces: Sequence[LayerPiece]) -> int:
        """Add the pieces that the layers of a run are cut into; call it before the run's first step.

        Pieces that another run added together in the same order are there already.

        Returns:
            The number of the first piece; the others follow.
        """
        first, data = len(self.signature.layers), to_document("layout", pieces_to_dict(pieces))
        digest = digest_of(data)
        for name, known in self.lineage.layouts:
            if known == digest:
                return first
            first += len(self._read_layout(name, known))
        added = (f"layout-{digest[:12]}.json", digest)
        self._files.publish(added[0], data)
        self.update_lineage(lambda lineage: replace(lineage, layouts=(*lineage.layouts, added)))
        return first

    @property
    def is_blank(self) -> bool:
        """Whether nothing was recorded here: no step that all ranks of this place have, and no edit."""
        here = [commit.n_steps for commit in self.here.commits if commit.number]
        if min(here, default=0):
            return False
        return self.is_part or not (self.lineage.n_steps or self.lineage.entries)

    def discard_empty(self) -> None:
        """Remove a store, or the part of one, in which nothing was ever recorded, so that another can take its place.

        Raises:
            StoreMismatchError: it holds steps or ledger entries, or a writer is open.
        """
        self._reader = self._lineage = None
        if not self.is_blank:
            raise StoreMismatchError(expected("store", "one without a step", f"steps or edits in {self.url!r}"))
        for rank in range(self.world_size):
            self.writer(rank, pieces=()).abandon()  # refused while somebody is about to publish the first steps
        folders = [rank_directory(rank) for rank in range(self.world_size)]
        ranks = [f"{folder}/{name}" for folder in folders for name in self.files.names(folder)]
        lineage = None if self.is_part else self.lineage
        initial = [] if lineage is None else [name for name, _ in (*lineage.initial, *lineage.layouts)]
        initial += [] if lineage is None else [self.initial_file]
        # The document that makes it a store goes first: what is left by an interruption is not taken for one.
        for name in (STORE, *initial, *([] if self.is_part else [self.lineage_file]), *ranks):
            if self.files.exists(name):
                self.files.delete(name)

    @classmethod
    def open(cls, url: str | os.PathLike[str], *, check: bool = True) -> DeltaStore:
        """Open a store.

        Args:
            url: Local path or fsspec URL.
            check: Whether to read commits and lineage at once, so that damage to them is told here; without it a
                damaged store can be opened to be verified and repaired.

        Raises:
            StoreMismatchError: there is no store, or one of another format version.
            StoreCorruptedError: a document of the store is damaged.
        """
        store = cls(Files(url))
        if check:
            store.refresh()
        return store

    def join(self, parts: Sequence[str | os.PathLike[str]]) -> Joined:
        """Copy what ranks recorded on other nodes into this store; see `join_parts`.

        Args:
            parts: The directories (or URLs) that they recorded into, as far as they can be reached from here.

        Raises:
            StoreMismatchError: one of them is of another store, has other steps, or is being written to.
            StoreCorruptedError: a file of a part is damaged.
        """
        joined = join_parts(self.url, parts)
        self.refresh()
        return joined

    def writer(
        self,
        rank: int = 0,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        size_budget: int | None = None,
        background: Background = "auto",
        pieces: Sequence[LayerPiece] | None = None,
    ) -> StoreWriter:
        """Open one rank's part for writing; see `StoreWriter`, and for `pieces` the property of that name.

        Raises:
            StoreMismatchError: another writer has it, the store has no such rank, or it is of an older format version.
        """
        if self.version < FORMAT_VERSION:
            # An older release could not open the store afterwards: that is decided, it does not happen on the way.
            rule = f"of format version {FORMAT_VERSION} to be written to"
            remedy = f"Run `lightning-unlearn store upgrade {self.url}`, or `DeltaStore.upgrade()`, first."
            raise StoreMismatchError(expected("store", rule, f"version {self.version}", remedy))
        if not 0 <= rank < self.world_size:
            raise StoreMismatchError(expected("rank", f"below the store's world size {self.world_size}", rank))
        return StoreWriter(
            self._files,
            self.store_id,
            with_pieces(self.signature, self.pieces if pieces is None else pieces),
            self.settings,
            rank=rank,
            segment_bytes=segment_bytes,
            size_budget=size_budget,
            background=background,
        )

    @property
    def anchors(self) -> list[int]:
        """Steps after which the whole state of the training was kept, ascending."""
        return anchor_steps(self.reader.commits, self.n_steps)

    def read_anchor(self, step: int, rank: int = 0) -> Anchor:
        """The state of the training after its first `step` recorded steps.

        Args:
            step: One of `anchors`.
            rank: Whose random number generators, and whose weights and optimizers where every rank kept its own.

        Raises:
            MissingDeltaError: there is no anchor.
            StoreCorruptedError: it is damaged.
        """
        return load_anchor(self._files, self.reader.commits, step, rank)

    def begin_run(
        self, kind: RunKind, optimizers: Sequence[OptimizerInfo], *, resumed: bool = False, first: int | None = None
    ) -> None:
        """A run begins at the next step; with `resumed` it goes on from a checkpoint of the last one.

        Args:
            kind: What the run is for.
            optimizers: Its optimizers.
            resumed: Whether it goes on from a checkpoint.
            first: Its first step, where ranks of other nodes have steps as well, which cannot be seen from here.
        """
        self.refresh()
        run = Run(kind, self.n_steps if first is None else first, tuple(optimizers))
        self.update_lineage(lambda lineage: lineage.with_run(run, resumed=resumed))

    def add_state(self, state: ModelState, elsewhere: Collection[int] = ()) -> None:
        """Make `state` known, as the tip. Flush the writer first: a state must not contain steps that can be lost.

        Args:
            state: The state.
            elsewhere: Ranks that record on other nodes, and have said themselves that its steps are committed there.

        Raises:
            StoreMismatchError: it contains steps that are not committed.
        """
        self.refresh()
        n_steps = min(commit.n_steps for rank, commit in enumerate(self.here.commits) if rank not in elsewhere)
        if any(stop > n_steps for _, stop in state.ranges):
            remedy = "Flush every rank's writer first."
            raise StoreMismatchError(expected("ranges", f"within the {n_steps} steps", state.ranges, remedy))
        self.update_lineage(lambda lineage: lineage.with_state(state))

    def truncate_states(self, n_steps: int) -> None:
        """Forget states and runs that contain steps from `n_steps` on; call it before truncating the writers.

        Raises:
            StoreMismatchError: a later run or an edit in force depends on them; nothing was changed.
        """
        self.update_lineage(lambda lineage: lineage.truncated(n_steps))


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return save_tensors({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
