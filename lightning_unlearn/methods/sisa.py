"""SISA: a training in shards and slices, of which only what saw the forgotten samples is trained again."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import field
from typing import ClassVar

from lightning import LightningModule

from lightning_unlearn.exceptions import MissingRequirementError, StoreMismatchError
from lightning_unlearn.methods.base import Cost, Guarantee, Procedure, ProcedureContext, Requirement, hyperparameters
from lightning_unlearn.methods.registry import register
from lightning_unlearn.shards.data import SisaData
from lightning_unlearn.shards.ensemble import SisaEnsemble
from lightning_unlearn.shards.folder import SisaFolder
from lightning_unlearn.shards.modules import ModuleFactory
from lightning_unlearn.shards.training import SisaTrainings, ensemble_of
from lightning_unlearn.utilities.checks import expected

__all__ = ["Sisa"]


@register
@hyperparameters
class Sisa(Procedure):
    r"""Train the touched shards of an ensemble again, from the checkpoint before the first touched slice.

    Rule: `SisaTraining` divides the samples into S shards of R slices and trains one module a shard, first on slice 1,
    from there on slices 1 and 2, and so on, e' = 2e/(R+1) epochs each, so that samples are seen as often as in e epochs
    on all of them; a checkpoint is kept of each stage. To forget, every touched shard goes back to the checkpoint
    before its first touched slice and repeats the stages from there without the samples. The shards answer together
    (`SisaEnsemble`): by the mean of their probabilities, or by majority.

    Guarantee: exact. On one CPU the ensemble is bit for bit the one trained without the samples from the start, with
    the other samples in the same slices: random numbers and order of each stage come from the seed, its shard and its
    slice, never from what ran before. On a GPU it is exact up to its kernels' order of summation. What was computed
    from all data before the training (normalisation, a vocabulary, sampling weights, hyper-parameters, the choice of
    pretrained weights) is not SISA's and may know the samples.

    Cost: of forgetting one sample, (2R + 1)/(3R) of one shard's training on average, that is between two thirds and all
    of a training on 1/S of the data; `SisaTraining.plan` says it exactly. Requests that are spread over all shards and
    reach their first slices cost a full training.

    Fails: shards have S times fewer samples, and the ensemble is less accurate for it where classes are rare or data
    few. Several processes, iterable data, samplers other than torch's own and Trainers that stop by the clock are
    refused. New samples need a training of their own. The contents of samples are not compared: the ids say which they
    are.

    The folder is changed for good before the result is judged: the deletion is written first, checkpoints that saw the
    samples are removed once the new ones are there, and a rollback of the pass does not bring them back. A process that
    was stopped in between is continued by the same request, or by `SisaTraining.fit`. The manifest keeps the ids of the
    forgotten samples, so that they are not taken for new ones.

    Differences from the official code: shards are divided by sample id, slices differ by one id at most, and no sample
    is dropped; every stage has an optimizer and schedule of its own, built by the module as in any fit (ours; the paper
    does not say); a slice that is empty has no stage, and a shard that is empty no vote (ours); probabilities are
    averaged by default, where the paper counts votes.

    Args:
        folder: What `SisaTraining` wrote.
        module_factory: Builds the untrained module, as in the training; attributes of a trained one might know the
            samples.
        weights_only: As `torch.load` takes it; `False` for checkpoints whose hyper-parameters are other objects than
            tensors and plain values, if they are trusted.

    Source: Bourtoule et al. 2021, arXiv 1912.03817.

    >>> Sisa(folder="runs/sisa")
    Sisa(folder='runs/sisa', weights_only=True)
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.RETAIN_DATA, Requirement.SHARDS})
    guarantee: ClassVar[Guarantee] = "exact"
    cost: ClassVar[Cost] = "full training"
    knows_length: ClassVar[bool] = True
    source: ClassVar[str] = "Bourtoule et al. 2021, arXiv 1912.03817"

    folder: str | os.PathLike[str] | None = None
    module_factory: ModuleFactory | None = field(default=None, repr=False)
    weights_only: bool = True

    def __post_init__(self) -> None:
        self.folder = None if self.folder is None else os.fspath(self.folder)

    def missing(self, available: Iterable[Requirement]) -> list[Requirement]:
        """As the base; whether the shards are there is known to the method alone."""
        given = self.folder is not None and self.module_factory is not None
        present = set(available) - {Requirement.SHARDS}
        return super().missing(present | {Requirement.SHARDS} if given else present)

    def run(self, context: ProcedureContext) -> LightningModule:
        """Train again what is touched and return the new ensemble.

        Raises:
            MissingRequirementError: the model is no `SisaEnsemble`, or the folder holds no training.
            StoreMismatchError: the ensemble is of another folder; or see `SisaData.check`, `SisaTrainings.check`.
            DeletionRequestError: see `SisaManifest.without`.
        """
        if self.folder is None or self.module_factory is None:
            raise MissingRequirementError(f"Sisa needs {Requirement.SHARDS.value}.")
        module, data = context.module, context.data
        if not isinstance(module, SisaEnsemble):
            rule, remedy = "the SisaEnsemble of the folder", "Use `Retrain` for other models."
            raise MissingRequirementError(expected("model", rule, type(module).__name__, remedy))
        folder = SisaFolder(self.folder)
        manifest = folder.manifest()
        if module.origin != manifest.origin:
            rule = f"the ensemble of the training in {folder.url}"
            raise StoreMismatchError(expected("model", rule, f"one of {module.origin}", "Use `SisaTraining.ensemble`."))
        ids = data.sample_ids
        forget = list(dict.fromkeys(ids[place] for place in data.forget_positions.tolist()))
        rows = SisaData.of(data.users_data, data.sample_keys, manifest.seed)
        trainings = SisaTrainings(
            folder, rows, self.module_factory, context.make_trainer, weights_only=self.weights_only
        )
        manifest = trainings.forget(manifest, forget)
        return ensemble_of(folder, manifest, self.module_factory, vote=module.vote, weights_only=self.weights_only)
