"""The documents of a store: what it is of, the weights at its start, its lineage, and the pieces of its layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.documents import digest_of, document_version, from_document
from lightning_unlearn.store.layout import pieces_from_dict
from lightning_unlearn.store.lineage import Lineage, lineage_from_dict
from lightning_unlearn.store.opening import corrupted
from lightning_unlearn.types import (
    DataFingerprint,
    LayerInfo,
    LayerPiece,
    ModelSignature,
    ModelState,
    RecordingSettings,
)
from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.file_views import DAMAGE
from lightning_unlearn.utilities.files import Files
from lightning_unlearn.utilities.parameters import model_signature, of_whole, tensors_digest

__all__ = ["INITIAL", "LINEAGE", "STORE", "StoreDocuments"]

STORE, INITIAL, LINEAGE = "store.json", "initial.safetensors", "lineage.json"
"""Names of a store's documents; `store.json` names the other two where they are called otherwise."""


class StoreDocuments:
    """What a store says of itself in its documents, without any step.

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

        A part of a store does not know them: who writes to it has to.

        Raises:
            StoreCorruptedError: a file is missing or damaged.
        """
        if self.is_part:
            return ()
        files = self.lineage.layouts
        if self._pieces[0] != files:
            self._pieces = files, tuple(piece for name, digest in files for piece in self._read_layout(name, digest))
        return self._pieces[1]

    def _read_layout(self, name: str, digest: str) -> tuple[LayerPiece, ...]:
        return pieces_from_dict(from_document("layout", f"{self.url}/{name}", self._read_checked(name, digest)))

    def _read_checked(self, name: str, digest: str) -> bytes:
        try:
            data = self._files.read(name)
            if digest_of(data) != digest:
                raise ValueError("the file does not fit its checksum")
        except DAMAGE as error:
            raise corrupted(name, [], error) from error
        return data

    @property
    def tip(self) -> ModelState:
        """The latest known state of the weights."""
        return self.lineage.states[-1]

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
        return load_tensors(self._read_checked(name, digest))

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
