"""Training in shards and slices, so that single samples can be forgotten exactly at a fraction of a training's cost."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from lightning_unlearn.data.plain_loaders import datamodule_of_loaders
from lightning_unlearn.data.positions import SampleKeys
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.functional.votes import VOTES, Vote
from lightning_unlearn.procedures.trainers import TrainerArgument, TrainerSource
from lightning_unlearn.shards.data import SisaData
from lightning_unlearn.shards.ensemble import SisaEnsemble
from lightning_unlearn.shards.folder import SisaFolder
from lightning_unlearn.shards.manifest import SisaManifest, SisaPlan, assign, slice_epochs
from lightning_unlearn.shards.modules import ModuleFactory, signature_of
from lightning_unlearn.shards.training import SisaTrainings, ensemble_of
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import check_choice, check_positive_int, expected

__all__ = ["SisaTraining"]


class SisaTraining:
    """A training by SISA (Bourtoule et al. 2021, arXiv 1912.03817) in a folder; the card of `Sisa` says how and why.

    Every one of its shards x slices trainings is an ordinary `Trainer.fit` of a new module on part of the data. The
    folder alone holds what is needed to continue, also in another process; one process at a time may change it.

    Args:
        folder: A local path or an fsspec URL.
        module_factory: Builds the untrained module, anew each time.
        epochs: Length of the whole training, divided among the slices such that samples are seen as often as in so
            many epochs on all data; or the epochs of each slice.
        trainer: Arguments of `Trainer`, or a function that takes overriding arguments and builds a fresh one. Each fit
            gets a copy of its callbacks.
        shards: How many modules. More make deletions cheaper and every module weaker; 5 is ours.
        slices: How many checkpoints a module. More make deletions cheaper and cost disk space; 4 is ours.
        vote: How the modules answer together, see `SisaEnsemble`.
        seed: Of everything that is drawn.
        sample_keys: Position in the underlying dataset -> stable key of a data subject; a subject is in one slice.
        weights_only: As `torch.load` takes it, see `Sisa`.

    >>> import torch
    >>> from lightning import LightningModule
    >>> from torch import nn
    >>> from torch.nn import functional
    >>> from torch.utils.data import TensorDataset
    >>> class Net(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         return self.layer(x)
    ...     def training_step(self, batch, batch_idx):
    ...         return functional.cross_entropy(self(batch[0]), batch[1])
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> data = DataLoader(TensorDataset(torch.randn(12, 2), torch.arange(12) % 2), batch_size=4, shuffle=True)
    >>> sisa = SisaTraining("memory://doc-sisa", module_factory=Net, epochs=3, shards=3, slices=2)
    >>> ensemble = sisa.fit(data)
    >>> print(sisa.plan([3]))
    shard 1 from slice 1 on: 6 samples x epochs, 17.6% of a training from the start
    >>> ensemble = sisa.unlearn([3], data)
    >>> len(ensemble.members), sisa.deleted
    (3, (3,))
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        module_factory: ModuleFactory,
        epochs: int | Sequence[int],
        trainer: TrainerArgument = None,
        shards: int = 5,
        slices: int = 4,
        vote: Vote = "softmax",
        seed: int = 0,
        sample_keys: SampleKeys | None = None,
        weights_only: bool = True,
    ) -> None:
        self.shards = check_positive_int("shards", shards)
        self.slices = check_positive_int("slices", slices)
        self.epochs = slice_epochs(epochs, slices) if isinstance(epochs, int) else tuple(epochs)
        if len(self.epochs) != slices or any(check_positive_int("epochs", one) < 1 for one in self.epochs):
            raise ValueError(expected("epochs", f"a number, or one for each of {slices} slices", epochs))
        self.vote: Vote = check_choice("vote", vote, VOTES)
        self.seed = check_positive_int("seed", seed, zero=True)
        self._folder = SisaFolder(folder)
        self._factory = module_factory
        self._trainers = TrainerSource(trainer)
        self._trainers.check_stages(self.shards * self.slices)
        self._sample_keys = sample_keys
        self._weights_only = weights_only

    @property
    def deleted(self) -> tuple[SampleId, ...]:
        """Ids that were asked to be forgotten, in order."""
        return self._manifest().deleted

    def fit(
        self,
        data: LightningDataModule | DataLoader[Any] | Mapping[str, DataLoader[Any]],
        *,
        without: Collection[SampleId] = (),
    ) -> SisaEnsemble:
        """Train, or go on where an earlier fit or deletion in this folder was stopped.

        Args:
            data: The datamodule, the training loader, or `{"train": ..., "val": ...}` loaders.
            without: Samples to leave out from the start: as if they had been forgotten.

        Raises:
            MissingRequirementError: fewer samples than slices; or no `sample_keys` where the folder's training has.
            StoreMismatchError: the folder holds a training with other settings, data or module.
            UnsupportedStrategyError: data or Trainer that cannot be repeated from a seed; see `Sisa`.
            DeletionRequestError: unknown ids to leave out, or ones that the folder's training saw.
        """
        if self._folder.exists:
            manifest = self._manifest()
            if not set(without) <= set(manifest.deleted):
                manifest.without([one for one in without if one not in manifest.deleted])
                rule, remedy = "samples that the training in the folder left out", "Forget them with `unlearn`."
                raise StoreMismatchError(expected("without", rule, without, remedy))
            trainings = self._trainings(self._data(data))
            trainings.check(manifest)
        else:
            rows = self._data(data)
            trainings = self._trainings(rows)
            manifest = self._new(rows, trainings.settings_of_trainer(self.epochs[0]))
            manifest = manifest.without(DeletionRequest(without).sample_ids) if without else manifest
            trainings.check(manifest)
            self._folder.write(manifest)
        trainings.run(manifest)
        return self._ensemble(manifest)

    def plan(self, ids: DeletionRequest | Collection[SampleId]) -> SisaPlan:
        """What forgetting samples takes; nothing is changed, and no data are needed.

        Raises:
            DeletionRequestError: unknown ids, some that are forgotten already, or all that are left.
        """
        return self._manifest().plan(_ids(ids))

    def unlearn(
        self,
        ids: DeletionRequest | Collection[SampleId],
        data: LightningDataModule | DataLoader[Any] | Mapping[str, DataLoader[Any]],
    ) -> SisaEnsemble:
        """Forget samples: train the touched shards again and remove every checkpoint that saw them.

        A deletion that was stopped is continued by the same call.

        Args:
            ids: The samples.
            data: The data of the training; forgotten rows may be gone.

        Raises:
            DeletionRequestError: as `plan`. Others as `fit`; nothing is changed then.
        """
        manifest = self._trainings(self._data(data)).forget(self._manifest(), _ids(ids))
        return self._ensemble(manifest)

    def ensemble(self) -> SisaEnsemble:
        """The trained modules in the folder, as one; what a deletion stopped at its very end left there is removed.

        Raises:
            MissingRequirementError: a training or deletion is not finished.
        """
        manifest = self._manifest()
        ensemble = self._ensemble(manifest)
        self._folder.sweep(manifest)
        return ensemble

    def _manifest(self) -> SisaManifest:
        manifest = self._folder.manifest()
        for name in ("seed", "shards", "slices", "epochs"):
            asked, found = getattr(self, name), getattr(manifest, name)
            if asked != found:
                raise StoreMismatchError(expected(name, f"{found}, as in the training in {self._folder.url}", asked))
        return manifest

    def _new(self, data: SisaData, trainer: Mapping[str, Any]) -> SisaManifest:
        rows = tuple(data.rows.values())
        parts = assign(rows, self.shards, self.slices, self.seed)
        return SisaManifest(
            origin=secrets.token_hex(8),
            seed=self.seed,
            shards=self.shards,
            slices=self.slices,
            epochs=self.epochs,
            keyed=data.keyed,
            root_length=data.root_length,
            rows=rows,
            parts=tuple(parts[one] for one in dict.fromkeys(rows)),
            deleted=(),
            signature=signature_of(self._factory),
            loader=data.drawing,
            trainer=trainer,
        )

    def _data(self, data: LightningDataModule | DataLoader[Any] | Mapping[str, DataLoader[Any]]) -> SisaData:
        users = data if isinstance(data, LightningDataModule) else datamodule_of_loaders(data)
        return SisaData.of(users, self._sample_keys, self.seed)

    def _trainings(self, data: SisaData) -> SisaTrainings:
        return SisaTrainings(self._folder, data, self._factory, self._trainers.make, weights_only=self._weights_only)

    def _ensemble(self, manifest: SisaManifest) -> SisaEnsemble:
        return ensemble_of(self._folder, manifest, self._factory, vote=self.vote, weights_only=self._weights_only)


def _ids(ids: DeletionRequest | Collection[SampleId]) -> tuple[SampleId, ...]:
    return ids.sample_ids if isinstance(ids, DeletionRequest) else DeletionRequest(ids).sample_ids
