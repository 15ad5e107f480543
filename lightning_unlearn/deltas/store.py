"""The store of recorded deltas: one directory that knows which run, model and data it belongs to."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from lightning_unlearn.deltas import maintenance
from lightning_unlearn.deltas.compression import check_compression
from lightning_unlearn.deltas.documents import digest_of, from_document, to_document
from lightning_unlearn.deltas.index import Ranges
from lightning_unlearn.deltas.info import StoreInfo, VerificationReport
from lightning_unlearn.deltas.lineage import Lineage, Run, RunKind, lineage_from_dict, lineage_to_dict
from lightning_unlearn.deltas.reader import StoreReader
from lightning_unlearn.deltas.rewrite import corrupted
from lightning_unlearn.deltas.writer import SEGMENT_BYTES, StoreWriter
from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError
from lightning_unlearn.types import (
    DataFingerprint,
    LayerDelta,
    LayerInfo,
    ModelSignature,
    ModelState,
    OptimizerInfo,
    RecordingSettings,
    SampleId,
    StepRecord,
    StepStatus,
)
from lightning_unlearn.utilities.checks import check_positive_int, expected, shorten
from lightning_unlearn.utilities.files import Files
from lightning_unlearn.utilities.parameters import change_norm, model_signature, tensors_digest

__all__ = ["DeltaStore"]

_STORE, _INITIAL, _LINEAGE = "store.json", "initial.safetensors", "lineage.json"


class DeltaStore:
    """A store of deltas; made by `create` or `open`, written by `writer`, and read by everything else.

    Reading sees what was committed when the store was opened or last refreshed. Opening never needs the model.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        try:
            body = from_document("store", f"{files.url}/{_STORE}", files.read(_STORE))
        except FileNotFoundError as error:
            raise StoreMismatchError(
                expected("url", "a place with a store of deltas", files.url, "Record one with `DeltaRecorder`.")
            ) from error
        self.store_id: str = body["store_id"]
        self.world_size: int = body["world_size"]
        self.signature = ModelSignature(
            tuple(LayerInfo(**{**layer, "shape": tuple(layer["shape"])}) for layer in body["signature"])
        )
        self.settings = RecordingSettings(**body["settings"])
        self.data = DataFingerprint(**body["data"])
        self._initial_digest: str = body["initial"]
        self._reader: StoreReader | None = None
        self._lineage: Lineage | None = None

    def __repr__(self) -> str:
        return f"DeltaStore({self.url!r})"

    @staticmethod
    def exists(url: str | os.PathLike[str]) -> bool:
        """Whether there is a store at `url`."""
        return Files(url).exists(_STORE)

    @classmethod
    def create(
        cls,
        url: str | os.PathLike[str],
        *,
        signature: ModelSignature,
        settings: RecordingSettings,
        data: DataFingerprint,
        initial: Mapping[str, Tensor],
        world_size: int = 1,
    ) -> DeltaStore:
        """Make a new, empty store.

        Args:
            url: Local path or fsspec URL, where no store is yet.
            signature: Names and shapes of the layers.
            settings: How deltas will be selected and written.
            data: What is known of the dataset.
            initial: Parameters and float buffers at the start, by name.
            world_size: Number of ranks that will write.

        Raises:
            StoreMismatchError: there is a store already, or `initial` does not fit the signature.
            MissingRequirementError: `compression="zstd"` without the package `zstandard`.
        """
        check_positive_int("world_size", world_size)
        check_compression(settings.compression)
        files = Files(url)
        if files.exists(_STORE):
            raise StoreMismatchError(
                expected("url", "a place without a store", files.url, "Open it, or choose another place.")
            )
        shapes = {layer.name: layer.shape for layer in signature.layers}
        if {name: tuple(tensor.shape) for name, tensor in initial.items()} != shapes:
            raise StoreMismatchError(expected("initial", "the tensors of the signature", shorten(initial)))
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in initial.items()}
        weights = save_tensors(tensors)
        parameters = {layer.name: tensors[layer.name] for layer in signature.layers if layer.kind == "parameter"}
        body = {
            "store_id": uuid.uuid4().hex,
            "world_size": world_size,
            "signature": [asdict(layer) for layer in signature.layers],
            "settings": asdict(settings),
            "data": asdict(data),
            "initial": digest_of(weights),
        }
        state = ModelState(tensors_digest(parameters), (), (), 0.0, change_norm(parameters))
        lineage = {"store_id": body["store_id"], **lineage_to_dict(Lineage(states=(state,)))}
        files.publish(_INITIAL, weights)
        files.publish(_LINEAGE, to_document("lineage", lineage))
        try:
            files.publish(_STORE, to_document("store", body), exclusive=True)
        except FileExistsError as error:
            raise StoreMismatchError(expected("url", "written by one process", f"another store at {url}")) from error
        return cls(files)

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
        return self._reader

    @property
    def n_steps(self) -> int:
        """Number of recorded steps that every rank has committed."""
        return self.reader.n_steps

    @property
    def lineage(self) -> Lineage:
        """Runs, known states and edits."""
        if self._lineage is None:
            name = f"{self.url}/{_LINEAGE}"
            try:
                body = from_document("lineage", name, self._files.read(_LINEAGE))
            except FileNotFoundError as error:
                raise StoreCorruptedError(expected(name, "there", "no such file", "Restore it from a copy.")) from error
            if body["store_id"] != self.store_id:
                raise StoreMismatchError(expected(name, f"of store {self.store_id}", body["store_id"]))
            self._lineage = lineage_from_dict(body)
        return self._lineage

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

    def writer(
        self,
        rank: int = 0,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        size_budget: int | None = None,
        background: bool = False,
    ) -> StoreWriter:
        """Open one rank's part for writing; see `StoreWriter`.

        Raises:
            StoreMismatchError: another writer has it, or the store has no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise StoreMismatchError(expected("rank", f"below the store's world size {self.world_size}", rank))
        return StoreWriter(
            self._files,
            self.store_id,
            self.signature,
            self.settings,
            rank=rank,
            segment_bytes=segment_bytes,
            size_budget=size_budget,
            background=background,
        )

    def info(self) -> StoreInfo:
        """What the store holds; reads every head, but no delta."""
        index, lineage = self.reader.index, self.lineage
        segments = [segment for rank in self.reader.segments for segment in rank]
        kept = sum(int(segment.entries["kept"].sum()) for segment in segments)
        payload = sum(segment.ref.bytes - segment.ref.head_bytes for segment in segments)
        return StoreInfo(
            url=self.url,
            store_id=self.store_id,
            steps=self.n_steps,
            stored=int((index.status == StepStatus.STORED).sum()),
            bytes=maintenance.total_bytes(self._files, self.world_size),
            bytes_per_kept=payload / kept if kept else 0.0,
            kept=kept,
            distinct_ids=len(index.ids_in(range(self.n_steps))),
            seconds=float(index.seconds.sum()),
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
        return self.reader.read(step)

    def steps_of(self, sample_ids: Collection[SampleId], within: Ranges | None = None) -> npt.NDArray[np.int64]:
        """Steps that saw one of the ids, ascending, int64."""
        return self.counts_of(sample_ids, within)[0]

    def counts_of(
        self, sample_ids: Collection[SampleId], within: Ranges | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Steps that saw one of the ids, ascending, and how often the ids occur in each, with multiplicity."""
        return self.reader.index.counts_of(sample_ids, within)

    def ids_in(self, steps: Iterable[int]) -> set[SampleId]:
        """The different ids of these steps."""
        return self.reader.index.ids_in(steps)

    def unseen(self, sample_ids: Iterable[SampleId], within: Ranges | None = None) -> list[SampleId]:
        """Those of the ids that occur in no step, in the given order."""
        return self.reader.index.unseen(sample_ids, within)

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

    def initial_weights(self) -> dict[str, Tensor]:
        """Parameters and float buffers at the start, by name.

        Raises:
            StoreCorruptedError: the file is missing or damaged.
        """
        try:
            data = self._files.read(_INITIAL)
            if digest_of(data) != self._initial_digest:
                raise ValueError("the file does not fit its checksum")
        except (ValueError, OSError) as error:
            raise corrupted(_INITIAL, [], error) from error
        return load_tensors(data)

    def check_model(self, module: nn.Module) -> None:
        """Check that a module has the recorded parameters (and buffers, where they were recorded).

        Raises:
            StoreMismatchError: names or shapes differ; the message names the first differing layers.
        """

        def shapes(signature: ModelSignature) -> dict[str, tuple[int, ...]]:
            kinds = ("parameter", "buffer") if self.settings.buffers == "record" else ("parameter",)
            return {layer.name: layer.shape for layer in signature.layers if layer.kind in kinds}

        recorded, given = shapes(self.signature), shapes(model_signature(module))
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

    def begin_run(self, kind: RunKind, optimizers: Sequence[OptimizerInfo], *, resumed: bool = False) -> None:
        """A run begins at the next step; with `resumed` it goes on from a checkpoint of the last one."""
        self.refresh()
        run = Run(kind, self.n_steps, tuple(optimizers))
        self.update_lineage(lambda lineage: lineage.with_run(run, resumed=resumed))

    def add_state(self, state: ModelState) -> None:
        """Make `state` known, as the tip. Flush the writer first: a state must not contain steps that can be lost.

        Raises:
            StoreMismatchError: it contains steps that are not committed.
        """
        self.refresh()
        if any(stop > self.n_steps for _, stop in state.ranges):
            remedy = "Flush every rank's writer first."
            raise StoreMismatchError(expected("ranges", f"within the {self.n_steps} steps", state.ranges, remedy))
        self.update_lineage(lambda lineage: lineage.with_state(state))

    def truncate_states(self, n_steps: int) -> None:
        """Forget states and runs that contain steps from `n_steps` on; call it before truncating the writers.

        Raises:
            StoreMismatchError: a later run or an edit in force depends on them; nothing was changed.
        """
        self.update_lineage(lambda lineage: lineage.truncated(n_steps))

    def update_lineage(self, change: Callable[[Lineage], Lineage]) -> Lineage:
        """Replace the lineage by `change(lineage)`, in one atomic write."""
        self._lineage = None
        lineage = change(self.lineage)
        body = {"store_id": self.store_id, **lineage_to_dict(lineage)}
        self._files.publish(_LINEAGE, to_document("lineage", body))
        self._lineage = lineage
        return lineage

    def verify(self) -> VerificationReport:
        """Check every byte; damage is reported, not raised."""
        return maintenance.verify(self._files, self.store_id, self.world_size, self._documents())

    def repair(self) -> VerificationReport:
        """Drop what is damaged and keep the rest: the delta of a step, or the step's ids too where they are damaged.

        Such steps keep their place with status `LOST`. What cannot be repaired (weights, lineage) stays as it is.

        Returns:
            What was found, as `verify` does.
        """
        report = self.verify()
        maintenance.repair(self._files, self.store_id, self.world_size, report)
        self._reader = self._lineage = None
        return report

    def purge(self, sample_ids: Collection[SampleId], steps: Collection[int] = ()) -> None:
        """Remove ids from every step, and the deltas of `steps`, for good; the rest of each record stays.

        Segments are written anew and the old files deleted. A purge that was interrupted is finished by calling it
        again; one that is finished changes nothing.

        Raises:
            StoreMismatchError: a writer is open.
            StoreCorruptedError: a segment is damaged; repair the store first.
        """
        maintenance.purge(self._files, self.store_id, self.world_size, set(sample_ids), set(steps))
        self._reader = None

    def _documents(self) -> dict[str, Callable[[], object]]:
        def lineage() -> Lineage:
            self._lineage = None
            return self.lineage

        return {_INITIAL: self.initial_weights, _LINEAGE: lineage}
