"""The training data of SISA: every row with its id, and whether they are still those that were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from lightning_unlearn.data.positions import SampleKeys, root_length
from lightning_unlearn.data.selected import check_selectable, drawn_positions
from lightning_unlearn.data.splits import sample_ids_of
from lightning_unlearn.exceptions import MissingRequirementError, StoreMismatchError
from lightning_unlearn.shards.manifest import SisaManifest
from lightning_unlearn.shards.modules import seeded
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import expected, shorten

__all__ = ["SisaData"]


@dataclass(frozen=True, slots=True)
class SisaData:
    """A user's training data, set up, with the id of every row that is drawn.

    Attributes:
        users: The datamodule.
        loader: Its training loader.
        rows: Position in the loader's dataset -> id, in ascending order of position.
        keyed: Whether ids are keys.
        root_length: Length of the dataset that positions count.
    """

    users: LightningDataModule
    loader: DataLoader[Any]
    rows: Mapping[int, SampleId]
    keyed: bool
    root_length: int | None

    @classmethod
    def of(cls, users: LightningDataModule, sample_keys: SampleKeys | None, seed: int) -> SisaData:
        """Set data up, with the random state of the seed: a split drawn in `setup` is the same each time.

        Raises:
            UnsupportedStrategyError: as `check_selectable`.
        """
        with seeded(seed, "data"):
            users.prepare_data()
            users.setup(stage="fit")
            loader = check_selectable(users.train_dataloader())
        ids = sample_ids_of(loader.dataset, sample_keys)
        rows = {position: ids[position] for position in drawn_positions(loader).tolist()}
        length = None if sample_keys is not None else root_length(loader.dataset)
        return cls(users, loader, rows, sample_keys is not None, length)

    @property
    def drawing(self) -> dict[str, Any]:
        """Batch size and way of drawing, as the manifest keeps them."""
        policy: Any = self.loader.batch_sampler
        sampler = self.loader.sampler if policy is None else policy.sampler
        return {
            "batch_size": None if policy is None else policy.batch_size,
            "drop_last": policy is not None and policy.drop_last,
            "sampler": type(sampler).__name__,
        }

    def check(self, manifest: SisaManifest) -> None:
        """Refuse data other than those that were trained on; deleted rows may be gone.

        Raises:
            MissingRequirementError: the training has keys, and none are given.
            StoreMismatchError: other rows, or another order, length, batch size or way of drawing.
        """
        if manifest.keyed and not self.keyed:
            rule, remedy = "given, as in the training", "Pass position -> key."
            raise MissingRequirementError(expected("sample_keys", rule, None, remedy))
        if self.keyed and not manifest.keyed:
            raise StoreMismatchError(expected("sample_keys", "None, as in the training", "keys", "Ask with positions."))
        if self.root_length != manifest.root_length:
            rule = f"the dataset of {manifest.root_length} samples, whose positions the training knows"
            raise StoreMismatchError(
                expected("data", rule, self.root_length, "Use `sample_keys` for data that change.")
            )
        gone = set(manifest.deleted)
        found = [one for one in self.rows.values() if one not in gone]
        wanted = [one for one in manifest.rows if one not in gone]
        if new := set(found) - set(wanted):
            rule, remedy = "the data of the training", "Train in another folder to add samples."
            raise StoreMismatchError(expected("data", rule, f"new samples {shorten(sorted(new, key=str))}", remedy))
        if lost := set(wanted) - set(found):
            rule, remedy = "the data of the training", "Forget samples before they are removed."
            raise StoreMismatchError(expected("data", rule, f"none of {shorten(sorted(lost, key=str))}", remedy))
        if found != wanted:
            raise StoreMismatchError(expected("data", "the data of the training", "its rows in another order"))
        if self.drawing != dict(manifest.loader):
            raise StoreMismatchError(expected("data", f"loaded as in the training, {manifest.loader}", self.drawing))
