"""Training what a SISA folder lacks: each stage an ordinary fit that depends on its seed, its samples and its start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer

from lightning_unlearn.data.selected import SelectedDataModule
from lightning_unlearn.exceptions import (
    DeletionRequestError,
    LightningUnlearnError,
    MissingRequirementError,
    StoreMismatchError,
    UnsupportedStrategyError,
)
from lightning_unlearn.functional.votes import Vote
from lightning_unlearn.shards.data import SisaData
from lightning_unlearn.shards.ensemble import SisaEnsemble
from lightning_unlearn.shards.folder import SisaFolder
from lightning_unlearn.shards.manifest import SisaManifest, SisaStage
from lightning_unlearn.shards.modules import (
    ModuleFactory,
    check_readable,
    check_signature,
    checkpoint_of,
    needs_two_samples,
    restored,
    seeded,
    untrained_checkpoint,
)
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.rng import seed_of
from lightning_unlearn.utilities.trainers import private_callbacks

__all__ = ["SisaTrainings", "ensemble_of"]


class SisaTrainings:
    """Makes the checkpoints that a manifest names and a folder lacks.

    Args:
        folder: The folder.
        data: The data.
        factory: Builds the untrained module.
        make_trainer: Builds a fresh Trainer; keyword arguments override the user's.
        weights_only: As `torch.load` takes it.
    """

    def __init__(
        self,
        folder: SisaFolder,
        data: SisaData,
        factory: ModuleFactory,
        make_trainer: Callable[..., Trainer],
        *,
        weights_only: bool = True,
    ) -> None:
        self._folder = folder
        self._data = data
        self._factory = factory
        self._make_trainer = make_trainer
        self._weights_only = weights_only
        self._checked: tuple[int, Trainer] | None = None

    def check(self, manifest: SisaManifest) -> None:
        """Refuse what cannot be trained on, before anything is written.

        Raises:
            MissingRequirementError: as `SisaData.check`.
            UnsupportedStrategyError: as `check_readable`; or the Trainer has several processes, keeps checkpoints of
                its own, or stops by the clock.
            DeletionRequestError: a single sample would be left to train a shard with batch normalisation on.
            StoreMismatchError: as `SisaData.check`; or the factory builds a module of another shape, or the Trainer is
                set otherwise than that of the training.
        """
        self._data.check(manifest)
        check_signature(self._factory, manifest)
        check_readable(self._factory, weights_only=self._weights_only)
        lacking = self._lacking(manifest)
        alone = [stage for stage in lacking if stage.rows == 1]
        if alone and needs_two_samples(self._factory):
            rule = f"leaving none or two samples in shard {alone[0].shard} up to slice {alone[0].slice}"
            remedy = "Batch normalisation cannot be trained on one: forget it as well."
            raise DeletionRequestError(expected("ids", rule, f"{list(alone[0].ids)} left there", remedy))
        if lacking:
            found = self.settings_of_trainer(lacking[0].epochs)
            if manifest.trainer and found != dict(manifest.trainer):
                rule, remedy = f"as in the training, {dict(manifest.trainer)}", "Pass `trainer=` as in the training."
                raise StoreMismatchError(expected("trainer", rule, found, remedy))

    def settings_of_trainer(self, epochs: int) -> dict[str, Any]:
        """What the weights depend on of the user's Trainer; its callbacks are not compared. Raises as `check`."""
        trainer = self._trainer(epochs)
        self._checked = epochs, trainer
        algorithm = trainer.gradient_clip_algorithm
        return {
            "precision": str(trainer.precision),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": None if algorithm is None else str(algorithm.value),
            "limit_train_batches": trainer.limit_train_batches,
            "reload_dataloaders_every_n_epochs": vars(trainer)["reload_dataloaders_every_n_epochs"],
        }

    def run(self, manifest: SisaManifest) -> None:
        """Train what is lacking, in order, then remove what the manifest does not name."""
        for shard in manifest.stages():
            self._begin(manifest, shard)
        for stage in self._lacking(manifest):
            self._folder.save(stage.name, self._trained(manifest, stage))
        self._folder.sweep(manifest)

    def forget(self, manifest: SisaManifest, ids: Sequence[SampleId]) -> SisaManifest:
        """Delete samples for good: write it down, train again, and remove what saw them.

        A request that was stopped on its way is continued.

        Returns:
            The manifest without them.

        Raises:
            DeletionRequestError: as `SisaManifest.without`; nothing is changed. Others as `check`.
        """
        unfinished = self._folder.missing(manifest) or self._folder.stale(manifest)
        continued = bool(unfinished) and set(ids) <= set(manifest.deleted)
        after = manifest if continued else manifest.without(ids)
        self.check(after)
        if not continued:
            self._folder.write(after)
        self.run(after)
        return after

    def _lacking(self, manifest: SisaManifest) -> list[SisaStage]:
        return [one for trained in manifest.stages().values() for one in trained if not self._folder.has(one.name)]

    def _begin(self, manifest: SisaManifest, shard: int) -> None:
        """Keep a shard's initial weights, so that a factory of later releases cannot change them."""
        name = manifest.first_checkpoint(shard)
        if self._folder.has(name):
            return
        with seeded(manifest.seed, shard, "start"):
            content = untrained_checkpoint(self._factory)
        self._folder.save(name, content)

    def _trained(self, manifest: SisaManifest, stage: SisaStage) -> bytes:
        origin = manifest.seed, stage.shard, stage.slice
        positions = [position for position, one in self._data.rows.items() if one in stage.ids]
        data = SelectedDataModule(self._data.users, self._data.loader, positions, seed_of(*origin, "order"))
        attached = self._data.users.trainer
        trainer = self._trainer(stage.epochs)
        try:
            with seeded(*origin, "module"):
                module = restored(self._factory, self._folder.load(stage.before, weights_only=self._weights_only))
            with seeded(*origin, "fit"):
                trainer.fit(module, datamodule=data)
            if not trainer.state.finished or trainer.global_step == 0:
                rule, got = "running to its end with at least one step", f"{trainer.global_step} steps"
                raise LightningUnlearnError(expected("trainer", rule, f"{got}, {trainer.state.status}"))
            return checkpoint_of(trainer)
        finally:
            self._data.users.trainer = attached

    def _trainer(self, epochs: int) -> Trainer:
        checked, self._checked = self._checked, None
        if checked is not None and checked[0] == epochs:
            return checked[1]
        remedy = "The folder keeps the checkpoints, so that none survives that saw a forgotten sample."
        try:
            trainer = self._make_trainer(max_epochs=epochs, enable_checkpointing=False)
        except MisconfigurationException as error:
            raise UnsupportedStrategyError(expected("trainer", "without checkpoints", str(error), remedy)) from error
        if trainer.checkpoint_callbacks:
            rule, got = "without checkpoints of its own", type(trainer.checkpoint_callbacks[0]).__name__
            raise UnsupportedStrategyError(expected("trainer", rule, got, remedy))
        if trainer.world_size > 1:
            rule, got = "of one process, for which shards are reproducible", f"one of {trainer.world_size}"
            raise UnsupportedStrategyError(expected("trainer", rule, got, "Use devices=1."))
        callbacks: list[Any] = vars(trainer)["callbacks"]
        clocks = [one for one in callbacks if isinstance(one, Timer)]
        if trainer.max_epochs != epochs or trainer.max_steps != -1 or clocks:
            rule = f"a Trainer of {epochs} epochs that no step limit or clock ends"
            got = f"max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}" + ", a Timer" * bool(clocks)
            remedy = "Let a factory pass on the arguments it is given, and `epochs` say the length."
            raise UnsupportedStrategyError(expected("trainer", rule, got, remedy))
        # Callbacks remember what ran before (early stopping its best value): every fit gets them as they were given.
        private_callbacks(trainer)
        return trainer


def ensemble_of(
    folder: SisaFolder,
    manifest: SisaManifest,
    factory: ModuleFactory,
    *,
    vote: Vote = "softmax",
    weights_only: bool = True,
) -> SisaEnsemble:
    """The finished shards of a folder as one module, in eval mode.

    Raises:
        MissingRequirementError: a training is not finished.
        StoreMismatchError: as `check_signature`.
    """
    missing = folder.missing(manifest)
    if missing:
        rule, remedy = "the folder of a finished training", "Run `fit` again; it goes on where it stopped."
        raise MissingRequirementError(expected("folder", rule, f"one without {missing[0]}", remedy))
    check_signature(factory, manifest)
    with seeded(manifest.seed, "members"):
        members = {
            shard: restored(factory, folder.load(stages[-1].name, weights_only=weights_only))
            for shard, stages in manifest.stages().items()
        }
    return SisaEnsemble(members, vote=vote, origin=manifest.origin).eval()
