"""Reading a store: its documents, lookups, deltas, weights and lineage."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.documents import digest_of, document_version, from_document
from lightning_unlearn.store.index import Ranges, in_ranges
from lightning_unlearn.store.info import StoreInfo
from lightning_unlearn.store.layout import pieces_from_dict
from lightning_unlearn.store.lineage import Lineage, lineage_from_dict
from lightning_unlearn.store.maintenance import total_bytes
from lightning_unlearn.store.opening import corrupted
from lightning_unlearn.store.reader import StoreReader
from lightning_unlearn.store.records import check_ids
from lightning_unlearn.types import (
    DataFingerprint,
    LayerDelta,
    LayerInfo,
    LayerPiece,
    ModelSignature,
    ModelState,
    RecordingSettings,
    SampleId,
    StepRecord,
    StepStatus,
)
from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.file_views import DAMAGE
from lightning_unlearn.utilities.files import Files
from lightning_unlearn.utilities.parameters import model_signature, of_whole, tensors_digest

__all__ = ["INITIAL", "LINEAGE", "STORE", "StoreView"]

STORE, INITIAL, LINEAGE = "store.json", "initial.safetensors", "lineage.json"
"""Names of a store's documents; `store.json` names the other two where they are called otherwise."""


def _median(errors: npt.NDArray[np.float32]) -> float | None:
    measured = errors[~np.isnan(errors)]
    return float(np.median(measured)) if measured.size else None


class StoreView:
    """The reading half of `DeltaStore`.

    Reading sees what was committed when the store was opened or last refreshed. The model is never needed.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        try:
            data = files.read(STORE)
            body = from_document("store", f"{files.url}/{STORE}", data)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreMismatchError(
                expected("url", "a place with a store of deltas", files.url, "Record one with `DeltaRecorder`.")
            ) from error
        self.version = document_version(data)
        self.store_id: str = body["store_id"]
        self.world_size: int = body["world_size"]
        self.signature = ModelSignature(
            tuple(LayerInfo(**{**layer, "shape": tuple(layer["shape"])}) for layer in body["signature"])
        )
        self.settings = RecordingSettings(**body["settings"])
        self.data = DataFingerprint(**body["data"])
        self.initial_file: str = body.get("initial_file", INITIAL)
        self.lineage_file: str = body.get("lineage_file", LINEAGE)
        self.frozen: dict[str, str] = dict(body.get("frozen", {}))
        self._initial_digest: str = body["initial"]
        self._reader: StoreReader | None = None
        self._lineage: Lineage | None = None
        self._pieces: tuple[tuple[tuple[str, str], ...], tuple[LayerPiece, ...]] = ((), ())

    def __repr__(self) -> str:
        return f"DeltaStore({self.url!r})"

    @property
    def url(self) -> str:
        """Where the store is."""
        return self._files.url

    @property
    def files(self) -> Files:
        """The directory behind the store."""
        return self._files

    @property
    def reader(self) -> StoreReader:
        """The view of all ranks' steps that was committed at the last refresh."""
        if self._reader is None:
            self._reader = StoreReader(self._files, self.store_id, self.signature, self.world_size)
            self._lineage = None  # which names the pieces that these steps may be in
        return self._reader

    @property
    def n_steps(self) -> int:
        """Number of recorded steps that every rank has committed."""
        return self.reader.n_steps

    @property
    def lineage(self) -> Lineage:
        """Runs, known states and edits."""
        if self._lineage is None:
            name = f"{self.url}/{self.lineage_file}"
            try:
                body = from_document("lineage", name, self._files.read(self.lineage_file))
            except FileNotFoundError as error:
                raise StoreCorruptedError(expected(name, "there", "no such file", "Restore it from a copy.")) from error
            if body["store_id"] != self.store_id:
                remedy = "Do not mix stores: restore it from a copy."
                raise StoreMismatchError(expected(name, f"of store {self.store_id}", body["store_id"], remedy))
            self._lineage = lineage_from_dict(body)
        return self._lineage

    @property
    def pieces(self) -> tuple[LayerPiece, ...]:
        """The pieces that layers were recorded in, numbered from the number of layers on; none without sharding.

        Raises:
            StoreCorruptedError: a file is missing or damaged.
        """
        files = self.lineage.layouts
        if self._pieces[0] != files:
            self._pieces = files, tuple(piece for name, digest in files for piece in self._read_layout(name, digest))
        return self._pieces[1]

    def _read_layout(self, name: str, digest: str) -> tuple[LayerPiece, ...]:
        try:
            data = self._files.read(name)
            if digest_of(data) != digest:
                raise ValueError("the file does not fit its checksum")
        except DAMAGE as error:
            raise corrupted(name, [], error) from error
        return pieces_from_dict(from_document("layout", f"{self.url}/{name}", data))

    @property
    def tip(self) -> ModelState:
        """The latest known state of the weights."""
        return self.lineage.states[-1]

    def refresh(self) -> None:
        """See what was committed since.

        Raises:
            StoreCorruptedError: a document is damaged.
        """
        self._reader = self._lineage = None
        _ = self.reader, self.lineage

    def info(self) -> StoreInfo:
        """What the store holds; reads every head and every id, but no delta."""
        index, lineage = self.reader.index, self.lineage
        segments = [segment for rank in self.reader.segments for segment in rank]
        kept = sum(int(segment.columns["kept"].sum()) for segment in segments)
        payload = sum(segment.ref.payload_bytes for segment in segments)
        return StoreInfo(
            url=self.url,
            store_id=self.store_id,
            format_versions=tuple(sorted({self.version, *(segment.version for segment in segments)})),
            steps=self.n_steps,
            stored=int((index.status == StepStatus.STORED).sum()),
            bytes=total_bytes(self._files, self.world_size),
            bytes_per_kept=payload / kept if kept else 0.0,
            kept=kept,
            distinct_ids=index.count_distinct(),
            seconds=float(index.seconds.sum()),
            pruning_error=_median(index.pruning_error),
            rounding_error=_median(index.rounding_error),
            edited=int(index.edited.sum()),
            world_size=self.world_size,
            settings=self.settings,
            data=self.data,
            runs=lineage.runs,
            states=lineage.states,
            entries=lineage.entries,
        )

    def record(self, step: int) -> StepRecord:
        """Everything about a step but its delta, merged over ranks; see `StoreReader.record`."""
        return self.reader.record(step)

    def read(self, step: int) -> dict[str, LayerDelta]:
        """The delta of a step by layer name, merged over ranks; see `StoreReader.read`."""
        return self.reader.read(step, self.pieces)

    def steps_of(self, sample_ids: Collection[SampleId], within: Ranges | None = None) -> npt.NDArray[np.int64]:
        """Steps that saw one of the ids, ascending, int64.

        Raises:
            ValueError: not a collection of integers and strings.
        """
        return self.counts_of(sample_ids, within)[0]

    def counts_of(
        self, sample_ids: Collection[SampleId], within: Ranges | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Steps that saw one of the ids, ascending, and how often the ids occur in each, with multiplicity."""
        return self.reader.index.counts_of(check_ids(sample_ids), within)

    def ids_in(self, steps: Iterable[int]) -> set[SampleId]:
        """The different ids of these steps."""
        return self.reader.index.ids_in(steps)

    def unseen(self, sample_ids: Iterable[SampleId], within: Ranges | None = None) -> list[SampleId]:
        """Those of the ids that occur in no step, in the given order."""
        return self.reader.index.unseen(check_ids(sample_ids), within)

    def batch_sizes(self, steps: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Number of samples behind each of the steps, over all ranks."""
        sizes: npt.NDArray[np.int64] = self.reader.index.batch_sizes[np.asarray(steps, np.int64)]
        return sizes

    def statuses(self, steps: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """`StepStatus` of each of the steps."""
        statuses: npt.NDArray[np.uint8] = self.reader.index.status[np.asarray(steps, np.int64)]
        return statuses

    def seconds_of(self, ranges: Ranges) -> float:
        """Wall time of all steps in the ranges."""
        return float(sum(self.reader.index.seconds[start:stop].sum() for start, stop in ranges))

    def lost_ids(self, ranges: Ranges) -> int:
        """Number of steps in the ranges whose ids were damaged and dropped by a repair."""
        index = self.reader.index
        steps = np.flatnonzero((index.status == StepStatus.LOST) & index.lost_ids)
        return int(in_ranges(steps, ranges).sum())

    def edited_steps(self, ranges: Ranges) -> int:
        """Number of steps in the ranges before which something other than an optimizer changed the weights."""
        return int(in_ranges(np.flatnonzero(self.reader.index.edited), ranges).sum())

    def initial_weights(self) -> dict[str, Tensor]:
        """Parameters and float buffers at the start, by name.

        Parameters of which only a digest was kept, because they were frozen, are left out: see `check_frozen`.

        Raises:
            StoreCorruptedError: a file is missing or damaged.
        """
        added = [self._read_initial(name, digest) for name, digest in self.lineage.initial]
        weights = self._read_initial(self.initial_file, self._initial_digest)
        return {name: tensor for part in (weights, *added) for name, tensor in part.items()}

    def _read_initial(self, name: str, digest: str) -> dict[str, Tensor]:
        try:
            data = self._files.read(name)
            if digest_of(data) != digest:
                raise ValueError("the file does not fit its checksum")
        except DAMAGE as error:
            raise corrupted(name, [], error) from error
        return load_tensors(data)

    def check_frozen(self, module: nn.Module, known: Collection[str] = ()) -> None:
        """Check that parameters whose initial values are not in the store are still what they were at the start.

        Args:
            module: The module.
            known: Names that need not be checked, because `initial_weights` has them.

        Raises:
            StoreMismatchError: one of them changed, or is not there.
        """
        asked = [name for name in self.frozen if name not in known]
        if asked:
            of_whole(module, lambda parameters: self.check_unchanged({name: parameters.get(name) for name in asked}))

    def check_unchanged(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Check that parameters that were frozen as the recording began have the values that they had then.

        Raises:
            StoreMismatchError: one of them was not frozen, changed, or is not there.
        """
        changed = self.changed_since_start(tensors)
        if changed:
            rule = "one whose frozen parameters are what they were as the recording began"
            remedy = (
                "Load the base model that was fine-tuned; what is to change by anything but an optimizer must require "
                "gradients as the recording begins, or be a buffer."
            )
            raise StoreMismatchError(expected("model", rule, f"other values of {shorten(changed)}", remedy))

    def changed_since_start(self, tensors: Mapping[str, Tensor | None]) -> list[str]:
        """Names of those that were not frozen as the recording began, have other values now, or are not there."""
        return [
            name
            for name, tensor in tensors.items()
            if tensor is None or tensors_digest({name: tensor}) != self.frozen.get(name)
        ]

    def check_model(self, module: nn.Module, root: nn.Module | None = None) -> None:
        """Check that a module has the recorded parameters (and buffers, where they were recorded).

        Args:
            module: The module; of a sharded one the whole tensors count, and every process must call this.
            root: As in `whole_tensors`.

        Raises:
            StoreMismatchError: names or shapes differ; the message names the first differing layers.
        """
        self.check_signature(model_signature(module, root))

    def check_signature(self, signature: ModelSignature) -> None:
        """`check_model` for names and shapes.

        Raises:
            StoreMismatchError: as there.
        """

        def shapes(signature: ModelSignature) -> dict[str, tuple[int, ...]]:
            kinds = ("parameter", "buffer") if self.settings.buffers == "record" else ("parameter",)
            return {layer.name: layer.shape for layer in signature.layers if layer.kind in kinds}

        recorded, given = shapes(self.signature), shapes(signature)
        differing = [
            f"{name}: {recorded.get(name, 'not recorded')} in the store, {given.get(name, 'missing')} in the model"
            for name in {**recorded, **given}
            if recorded.get(name) != given.get(name)
        ]
        if differing:
            remedy = "Use the store that was recorded with this model."
            raise StoreMismatchError(expected("model", f"the one of {self.url}", shorten(differing), remedy))

    def state_of(self, digest: str) -> ModelState | None:
        """The latest known state with these weights (`weights_digest`), or `None`."""
        return self.lineage.state_of(digest)

    def shortest_state_of(self, digest: str) -> ModelState | None:
        """Of the states with these weights the one that the fewest steps led to, for who goes through them again."""
        return self.lineage.shortest_state_of(digest)
