"""Randomness by the place in a run alone, so that two runs can be the same but for the samples left out of one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_unlearn.callbacks.thinned_batches import ThinnedBatches, ThinningCallback
from lightning_unlearn.data.positions import SampleKeys
from lightning_unlearn.data.seeded_items import LoaderCopies, seeded_view
from lightning_unlearn.data.seeded_order import Place, SeededOrder, indices_in, place_of
from lightning_unlearn.data.splits import positions_of
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import check_choice, check_positive_int, expected
from lightning_unlearn.utilities.parameters import tensors_digest
from lightning_unlearn.utilities.rng import RngState, capture_rng, seed_generators
from lightning_unlearn.utilities.trainers import end_fit

__all__ = ["ForgottenUnit", "Lockstep"]

ForgottenUnit: TypeAlias = Literal["samples", "batches"]
"""What is left out of a training: the forgotten samples, or every batch that holds one of them."""


class Lockstep(ThinningCallback):
    """Make a run's randomness a function of `seed` and the place in the run, and leave some samples out of it.

    Runs with the same seed then differ in what is left out, and in nothing that is drawn: the order of an epoch depends
    on the seed and the epoch (and on the state of generators that the user's samplers own, which are copied and never
    advanced); what the dataset draws for a sample, on seed, epoch and position; what `collate_fn`, transfer hooks and
    the training step draw, on seed, epoch and the batch's number before anything was left out. A dropout mask of a
    batch that lost some of its samples has another shape, so it is another mask: `unit="batches"` leaves only batches
    that are the original's.

    Schedules, validation and accumulated gradients end a thinned epoch as any other (`ThinnedBatches`). Random
    generators that a dataset or transform owns cannot be seeded from here; `contents` shows it.

    Args:
        seed: Seed of everything that is drawn.
        forget: Ids of the samples to leave out: positions in the underlying dataset, or keys with `sample_keys`.
        sample_keys: Position in the underlying dataset -> stable key.
        unit: Whether the samples are left out, or every batch that holds one.
        until: Epoch and number in it of the last batch to train on; by default the Trainer's limits decide.

    Attributes:
        last: Epoch and number (before anything was left out) of the last batch that was trained on.
        complete: Whether all batches up to `until` were trained on.
        contents: Epoch and number -> digest of a batch that nothing was left out of; of batches 0, 1, 2, 4, 8, ...

    Raises:
        UnsupportedStrategyError: (in `setup`) several processes, or a step that fetches its own batches; (when data is
            loaded) no map-style `DataLoader`, or one whose sampler cannot be copied; (as training starts) several
            loaders, or a fit that goes on from a checkpoint.
        DeletionRequestError: (when data is loaded) ids that are not in the data.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        seed: int = 0,
        forget: Collection[SampleId] = (),
        *,
        sample_keys: SampleKeys | None = None,
        unit: ForgottenUnit = "samples",
        until: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self._seed = check_positive_int("seed", seed, zero=True)
        self._forget = forget
        self._sample_keys = sample_keys
        self._unit: ForgottenUnit = check_choice("unit", unit, ("samples", "batches"))
        self._until = until
        self._copies = LoaderCopies()
        self._before: RngState | None = None
        self.last: tuple[int, int] | None = None
        self.complete = False
        self.contents: dict[tuple[int, int], str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the step into the Trainer."""
        if stage != "fit":
            return
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            rule, got = "a step that is given its batch", "`training_step(dataloader_iter)`"
            raise UnsupportedStrategyError(expected("training_step", rule, got, "Take `batch, batch_idx`."))
        self.install(trainer, "train in lockstep")
        self._copies, self._before = LoaderCopies(), capture_rng()
        self.last, self.complete, self.contents = None, False, {}
        seed_generators(self._seed, "setup")

    def policy(self, trainer: Trainer, loader: Any) -> ThinnedBatches:
        """The loader's own batches in an order of their own, without what is to be left out."""
        left_out = positions_of(self._forget, loader.dataset, self._sample_keys) if self._forget else ()
        copied = self._copies(loader)
        own = copied["sampler" if loader.batch_sampler is None else "batch_sampler"]
        order = SeededOrder(own, self._seed, lambda: trainer.current_epoch, self._until)
        return ThinnedBatches(order, trainer, frozenset(map(int, left_out)), unit=self._unit)

    def view(self, loader: Any, policy: ThinnedBatches) -> Any:
        """A view whose samples and batches are seeded."""

        def delivered(number: int) -> None:  # hooks that move a batch to the device may augment it there
            self._seed_batch("transfer", _place(policy, number))

        return seeded_view(loader, policy, self._seed, self._copies(loader), delivered)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse several loaders, whose batches together make a step, and a fit that goes on from a checkpoint."""
        combined = trainer.fit_loop._combined_loader
        n_loaders = 0 if combined is None else len(combined.flattened)
        if n_loaders != 1:
            remedy = "Put the data into one loader."
            raise UnsupportedStrategyError(expected("train_dataloader", "one loader", f"{n_loaders} of them", remedy))
        if trainer.ckpt_path is not None:
            rule, remedy = "None, for what generators had drawn by then is not known", "Train from the beginning."
            raise UnsupportedStrategyError(expected("ckpt_path", rule, str(trainer.ckpt_path), remedy))
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed what hooks of this epoch draw before its first batch."""
        super().on_train_epoch_start(trainer, pl_module)
        seed_generators(self._seed, "epoch", trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the step by its batch."""
        if self._policy is None:
            return
        place = _place(self._policy, batch_idx)
        self.last = place.epoch, place.ordinal
        # Few, and late ones among them: what is drawn from a generator of somebody's own drifts apart with time.
        noted = place.ordinal & (place.ordinal - 1) == 0
        if noted and len(_indices(self._policy, batch_idx)) == place.size:
            self.contents[self.last] = _digest(batch)
        self._seed_batch("step", place)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run where it is to end."""
        seed_generators(self._seed, "epoch end", trainer.current_epoch)
        if self._until is None or trainer.current_epoch < self._until[0] or self._policy is None:
            return
        kept = self._policy.kept or []
        self.complete = not kept or self.last == place_of(kept[-1])[:2]
        end_fit(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the step out again, and give the random state back as it was found."""
        super().teardown(trainer, pl_module, stage)
        if self._before is not None:
            self._before.restore()
        self._copies, self._before = LoaderCopies(), None

    def _seed_batch(self, purpose: str, place: Place) -> None:
        seed_generators(self._seed, purpose, place.epoch, place.ordinal)


def _indices(policy: ThinnedBatches, number: int) -> Sequence[Any]:
    """What is left of a batch, by its number among those that are left of the epoch."""
    return indices_in((policy.kept or [])[number])


def _place(policy: ThinnedBatches, number: int) -> Place:
    return place_of(_indices(policy, number))


def _digest(batch: Any) -> str:
    """Hex digest of a batch's tensors, and of the plain values beside them."""
    leaves = tree_leaves(batch)
    tensors = {
        str(place): leaf
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested
    }
    plain = [leaf for leaf in leaves if isinstance(leaf, str | int | float)]
    return tensors_digest(tensors) + repr(plain)
