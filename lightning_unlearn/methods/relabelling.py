"""What methods share that train on the data to forget with other labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from lightning_unlearn.methods.base import Guarantee, Requirement, hyperparameters
from lightning_unlearn.methods.loss_method import PushingMethod, UnlearningHost, as_loss
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.checks import check_choice, check_positive_int
from lightning_unlearn.utilities.fingerprints import fingerprints
from lightning_unlearn.utilities.modes import evaluating

__all__ = ["Draw", "Labels", "Relabelling"]

Labels: TypeAlias = Literal["wrong", "any"]
Draw: TypeAlias = Literal["batch", "sample"]


@hyperparameters
class Relabelling(PushingMethod):
    """A method whose forget term is a loss against randomly drawn other labels.

    Multi-label targets are flipped. Labels of another kind (regression) need an adapter whose `wrong_targets` says what
    a wrong one is. Negative class numbers, which losses ignore, stay.

    Args:
        labels: `"wrong"` never draws the true class, `"any"` may.
        draw: `"batch"` draws anew for every batch. `"sample"` draws once for a sample: it is found again by its inputs,
            so they must be the same bits every time (no random augmentation, no padding that depends on the batch).
        seed: Seed of `"sample"`; `"batch"` draws from the global random state.
        n_classes: Number of classes, counted in the model's logits unless it is given.
        max_steps: Optimizer steps; 50 unless `max_epochs` is given.
        max_epochs: Passes over the longer part instead.
        optimizer: See `LossMethod`.
        lr_scale: See `LossMethod`.
        stop: See `PushingMethod`.
        check_every: See `PushingMethod`.
        forget_statistics: See `ForgetStatistics`.
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.FORGET_DATA, Requirement.RETAIN_DATA})
    guarantee: ClassVar[Guarantee] = "heuristic"
    parts: ClassVar[tuple[Part, ...]] = ("forget", "retain")
    default_steps: ClassVar[int | None] = 50

    labels: Labels = "wrong"
    draw: Draw = "batch"
    seed: int = 0
    n_classes: int | None = None
    lr_scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels = check_choice("labels", self.labels, ("wrong", "any"))
        self.draw = check_choice("draw", self.draw, ("batch", "sample"))
        self.seed = check_positive_int("seed", self.seed, zero=True)
        self.n_classes = None if self.n_classes is None else check_positive_int("n_classes", self.n_classes)
        self._counted: int | None = None

    def finish(self, host: UnlearningHost) -> None:
        """The next pass may have another model."""
        super().finish(host)
        self._counted = None

    def relabelled(self, host: UnlearningHost, batch: Any) -> Any:
        """A forget batch with drawn labels in place of its own; the given one stays."""
        return host.batch_adapter.replaced(batch, targets=self.drawn_labels(host, batch))

    def relabelled_loss(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Tensor | None:
        """The user's own training loss on the forget part with drawn labels; `None` where the user's step skips it."""
        return as_loss(host.user_step("forget", self.relabelled(host, batch["forget"]), batch_idx))

    def drawn_labels(self, host: UnlearningHost, batch: Any) -> Tensor:
        """Labels for a forget batch, as `labels` and `draw` say."""
        adapter = host.batch_adapter
        targets = adapter.targets(batch)
        classes, wrong = self._classes(host, batch, targets), self.labels == "wrong"
        if self.draw == "batch":
            return adapter.wrong_targets(targets, classes, avoid_true=wrong)
        rows = []
        numbers = fingerprints(adapter.inputs(batch), len(targets), seed=self.seed)
        with torch.random.fork_rng(devices=[]):
            for number, row in zip(numbers, torch.split(targets.cpu(), 1), strict=True):
                torch.default_generator.manual_seed(number)
                rows.append(adapter.wrong_targets(row, classes, avoid_true=wrong))
        return torch.cat(rows).to(targets.device)

    def _classes(self, host: UnlearningHost, batch: Any, targets: Tensor) -> int:
        if self.n_classes is not None:
            return self.n_classes
        if targets.is_floating_point():
            return 2  # yes or no, for every label
        if self._counted is None:
            # In eval mode, so that nothing is drawn for dropout and no statistics move.
            with torch.no_grad(), evaluating(cast(nn.Module, host)):
                self._counted = int(host.outputs_of("forget", batch)[0].shape[1])
        return self._counted
