"""Relearn time: how long a model trains until it knows the forgotten samples again."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_unlearn.data.splits import check_splittable, subset_loader
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.functional.weight_change_penalty import weight_change_penalty
from lightning_unlearn.modules.gradients import differentiable
from lightning_unlearn.modules.probe import ProbeData
from lightning_unlearn.procedures.guards import private_copy
from lightning_unlearn.procedures.relearn_result import (
    RELEARN_SETTINGS,
    RelearnEnd,
    RelearnResult,
    RelearnRun,
    RelearnSetting,
)
from lightning_unlearn.utilities.checks import check_choice, expected
from lightning_unlearn.utilities.rng import seed_of, seeded_generators
from lightning_unlearn.utilities.whole_weights import is_sharded

__all__ = ["relearn_time"]


def relearn_time(
    model: LightningModule,
    forget_data: DataLoader[Any],
    *,
    train_data: DataLoader[Any] | None = None,
    retrained: LightningModule | None = None,
    setting: RelearnSetting | str = "golatkar",
    seed: int = 0,
    device: torch.device | str | None = None,
) -> RelearnResult:
    """Train a copy on data that contain the forgotten samples until its mean loss on them is at most a threshold.

    A model that still holds traces of the samples relearns them faster than one that never saw them. The right value is
    the retrained model's: slower is no better, it belongs to a model that was pushed away from the samples.

    Training and loss are the module's own `training_step`, in eval mode (no dropout, running statistics fixed), under
    plain SGD. Both models see the same draws of data. Neither they nor the random state are changed. Batches are read
    in this process; those of the forgotten samples are kept until the end.

    Guarantee: exact for the setting and seed, as far as the device's arithmetic is deterministic. As evidence of
    forgetting heuristic: it depends on the learning rate, and a threshold between two losses may tell nothing.

    Source: Golatkar et al. 2020 (arXiv 1911.04933) and Kurmanji et al. 2023 (SCRUB, arXiv 2302.09880), their code.

    Args:
        model: The model under test.
        forget_data: The forgotten samples, in evaluation form.
        train_data: What is trained on; it has to contain the forgotten samples. The papers take all of the original
            training data. By default the forgotten samples alone, which are relearned sooner.
        retrained: A model trained without the forgotten samples.
        setting: A `RelearnSetting`, or `"golatkar"` (learning rate 0.01) or `"scrub"` (0.1), see `RELEARN_SETTINGS`.
        seed: Of the draws, and of transforms that draw from global generators.
        device: Where to train; by default where each model is.

    Returns:
        Steps and epochs of both models, and their ratio where both are numbers: a run that ended at the cap, or whose
        loss was not finite, has none. A model that is at the threshold already needs 0 steps.

    Raises:
        UnsupportedStrategyError: iterable data, data without a batch size, a module that cannot be copied, is in pieces
            on several processes or optimized manually, or a training step without a loss.
        ValueError: an unknown setting, or a model without trainable parameters.

    >>> class Line(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.zeros(1))
    ...
    ...     def training_step(self, batch, batch_idx):
    ...         return (self.weight - batch).square().mean()
    >>> data = DataLoader(torch.ones(4, 1), batch_size=2)
    >>> setting = RelearnSetting(learning_rate=0.25, threshold=0.01, samples_per_epoch=4)
    >>> print(relearn_time(Line(), data, setting=setting).model)  # the error halves with every step
    4 steps (2 epochs)
    """
    if not isinstance(setting, RelearnSetting):
        setting = RELEARN_SETTINGS[check_choice("setting", setting, tuple(RELEARN_SETTINGS))]
    for name, one in (("model", model), ("retrained", retrained)):
        if one is not None and is_sharded(one):
            remedy = "Load its full state dict into a module of its own on every process, and pass that."
            rule = "a module with whole parameters"
            raise UnsupportedStrategyError(expected(name, rule, "one in pieces on several processes", remedy))
    check_splittable(forget_data, "forget_data")
    source = forget_data if train_data is None else check_splittable(train_data, "train_data")
    draws = _Draws(source, setting, seed)
    probe = ProbeData(forget_data, max_samples=len(forget_data.dataset), seed=seed)  # type: ignore[arg-type]
    tested = _relearn(model, probe, draws, setting, device)
    reference = None if retrained is None else _relearn(retrained, probe, draws, setting, device)
    return RelearnResult(tested, reference, setting, seed)


class _Draws:
    """Epochs of samples that are drawn with replacement, the same for every model."""

    def __init__(self, source: DataLoader[Any], setting: RelearnSetting, seed: int) -> None:
        # Every sample once in evaluation form: what the user's loader says of collating and batches, not its order.
        whole = subset_loader(source, range(len(source.dataset)), part=None)  # type: ignore[arg-type]
        if whole.batch_size is None:
            rule, remedy = "a loader that makes batches of samples", "Its dataset gives whole batches, which hide them."
            raise UnsupportedStrategyError(expected("train_data", rule, "one without a batch size", remedy))
        self.seed = seed
        self._dataset, self._collate = whole.dataset, whole.collate_fn
        self._size = setting.batch_size or whole.batch_size
        self._samples = setting.samples_per_epoch

    def epoch(self, number: int) -> DataLoader[Any]:
        """The batches of an epoch. No workers: random transforms draw from the generators that the run has seeded."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "relearn", number))
        total = len(self._dataset)  # type: ignore[arg-type]
        drawn: list[int] = torch.randint(total, (self._samples,), generator=generator).tolist()
        return DataLoader(self._dataset, self._size, sampler=drawn, collate_fn=self._collate)


def _relearn(
    model: LightningModule,
    probe: ProbeData,
    draws: _Draws,
    setting: RelearnSetting,
    device: torch.device | str | None,
) -> RelearnRun:
    learner = private_copy(model)
    if device is not None:
        learner.to(device)
    learning = _Learning(learner, setting)
    losses: list[float] = []
    steps = 0

    def end() -> RelearnEnd | None:
        """Look at the loss on the forgotten samples, and say whether that ends the run."""
        loss = probe.mean_loss(learner)
        if loss is None:
            rule = "one that returns a loss on the forgotten samples, under automatic optimization"
            raise UnsupportedStrategyError(expected("training_step", rule, "no loss"))
        losses.append(loss)
        if not math.isfinite(loss):
            return "diverged"
        return "relearned" if loss <= setting.threshold else None

    with seeded_generators(draws.seed, "relearn"):
        found = end()
        if found is not None:
            return RelearnRun(found, 0, 0, tuple(losses))
        with differentiable(learner) as (loss_of, _):
            for epoch in range(1, setting.max_epochs + 1):
                batches = draws.epoch(epoch)
                for place, batch in enumerate(batches, start=1):
                    moved = learning.step(loss_of(batch))
                    steps += moved
                    due = moved and setting.check_every is not None and steps % setting.check_every == 0
                    found = end() if due or place == len(batches) else None
                    if found is not None:
                        return RelearnRun(found, steps, epoch, tuple(losses))
    return RelearnRun("capped", steps, setting.max_epochs, tuple(losses))


class _Learning:
    """Plain SGD on the trainable parameters, with the penalty on their way from the start."""

    def __init__(self, learner: nn.Module, setting: RelearnSetting) -> None:
        self._parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        if not self._parameters:
            raise ValueError(expected("model", "one with trainable parameters", "none", "Unfreeze what may relearn."))
        self._start = [parameter.detach().clone() for parameter in self._parameters] if setting.penalty else []
        self._penalty = setting.penalty
        self._optimizer = torch.optim.SGD(self._parameters, lr=setting.learning_rate)

    def step(self, loss: torch.Tensor | None) -> bool:
        """Take a step, unless the user's training step skips the batch; return whether one was taken."""
        if loss is None:
            return False
        loss = loss.mean()
        if self._start:
            loss = loss + weight_change_penalty(self._parameters, self._start, self._penalty)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return True
