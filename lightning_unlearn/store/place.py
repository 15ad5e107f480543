"""Where a store is: its documents, and which ranks' steps are there."""

from __future__ import annotations

from lightning_unlearn.exceptions import MissingDeltaError, StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.documents import digest_of, document_version, from_document
from lightning_unlearn.store.layout import pieces_from_dict
from lightning_unlearn.store.lineage import Lineage, lineage_from_dict
from lightning_unlearn.store.opening import corrupted
from lightning_unlearn.store.reader import StoreReader
from lightning_unlearn.types import (
    DataFingerprint,
    LayerInfo,
    LayerPiece,
    ModelSignature,
    ModelState,
    RecordingSettings,
)
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.file_views import DAMAGE
from lightning_unlearn.utilities.files import Files

__all__ = ["INITIAL", "LINEAGE", "STORE", "StorePlace"]

STORE, INITIAL, LINEAGE = "store.json", "initial.safetensors", "lineage.json"
"""Names of a store's documents; `store.json` names the other two where they are called otherwise."""

_ATTEMPTS = 5


class StorePlace:
    """Where a store is: what its documents say, and which ranks' steps are there.

    Reading sees what was committed when the store was opened or last refreshed. The model is never needed.

    Attributes:
        body: What `store.json` says.
        is_part: Whether this is what the ranks of another node than rank 0's recorded: a part, which can be written to
            and joined, but not read as a store.
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
        self.body = body
        self.is_part: bool = body.get("part", False)
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
        self._complete = False
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
        """The view of all ranks' steps that was committed at the last refresh.

        Raises:
            MissingDeltaError: parts of the store, which ranks of other nodes recorded there, are not here.
        """
        if not self._complete:
            self.check_complete()
        return self.here

    @property
    def here(self) -> StoreReader:
        """What the last refresh found in this place, whether or not parts of other nodes are missing."""
        if self._reader is None:
            self._reader = StoreReader(self._files, self.store_id, self.signature, self.world_size)
            self._lineage = None  # which names the pieces that these steps may be in
        return self._reader

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """Ranks without steps that known weights contain: they recorded on other nodes, and are to be joined."""
        known = self.lineage.n_steps
        # Rank 0 cannot be one of them: it made the store.
        return tuple(rank for rank, commit in enumerate(self.here.commits) if rank and commit.n_steps < known)

    def check_complete(self) -> None:
        """Check that every rank's steps are here.

        Raises:
            MissingDeltaError: some recorded theirs on another node, and were not joined yet.
        """
        for _ in range(_ATTEMPTS):
            missing, found = self.missing_ranks, (self.lineage.n_steps, self.here.commits)
            if not missing:
                break
            self.refresh()  # a writer that goes on may have changed one document between the readings of both
            if found == (self.lineage.n_steps, self.here.commits):
                break
        if missing:
            rule = f"whole, with {self.lineage.n_steps} steps of each of its {self.world_size} ranks"
            remedy = f"Join them from the nodes that recorded them: `lightning-unlearn store join {self.url} PART ...`."
            got = f"no part of rank {', '.join(map(str, missing))}"
            raise MissingDeltaError(expected("store", rule, got, remedy))
        self._complete = True

    @property
    def n_steps(self) -> int:
        """Number of recorded steps that every rank has committed."""
        return self.reader.n_steps

    @property
    def lineage(self) -> Lineage:
        """Runs, known states and edits."""
        if self._lineage is None and self.is_part:
            remedy = "Join it: `lightning-unlearn store join URL PART`, where URL is what rank 0 recorded into."
            got = f"the part of store {self.store_id} at {self.url} that ranks of another node than rank 0's recorded"
            raise StoreMismatchError(expected("url", "a whole store", got, remedy))
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
        self._complete = False
        _ = self.here, self.lineage
