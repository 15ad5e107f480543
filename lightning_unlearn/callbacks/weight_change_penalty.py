"""A penalty on how far the weights of a training move."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor

from lightning_unlearn.callbacks.anchor_sources import WeightSource
from lightning_unlearn.callbacks.penalty import Penalty, PenaltySchedule
from lightning_unlearn.callbacks.weight_anchor import Anchored, WeightAnchor
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.functional.weight_change_penalty import weight_change_penalty
from lightning_unlearn.utilities.checks import check_fraction, check_positive, expected

__all__ = ["WeightChangePenalty"]


class WeightChangePenalty(Anchored, Penalty):
    r"""Adds :math:`\lambda \lVert w - w_0 \rVert_2^2` to the loss of every training step: weights stay near an anchor.

    The unlearning error of Thudi et al. grows with the distance that a training has travelled, so a training that stays
    near its start is one whose effects a later deletion can undo more easily; how much easier, and at what accuracy, is
    to be measured (`UnlearningErrorMonitor`, `train_twins`). Around pretrained weights it is the penalty L2-SP of Li,
    Grandvalet and Davoine 2018 (arXiv 1802.01483). Heuristic: nothing is guaranteed about a later deletion.

    As a term of the loss it is right under gradient scalers, accumulation, clipping, data parallelism, and optimizers
    that call the step again. On parameters sharded by `ModelParallelStrategy` (FSDP2) every process computes its part;
    other sharding is refused. Manual optimization is refused, too: there the step has to add
    `lightning_unlearn.functional.weight_change_penalty.weight_change_penalty` itself.

    Memory: one copy of the trainable parameters in `layers`, and their gradients once more during the backward pass.
    Checkpoints hold that copy as well, because a resumed training starts elsewhere. They do not where a file or store
    holds it: `anchor` names one, or a `DeltaRecorder` in the same Trainer records this training from its start.

    Args:
        strength: :math:`\lambda`, at least 0; for the sum of squares, not their mean.
        anchor: `"initial"`: the weights that the training starts from. A checkpoint file, a store of deltas (its
            initial weights) or weights by name. `"moving"`: an average that follows the weights after every step.
        decay: Of the moving anchor: the share of itself that it keeps in a step, in (0, 1].
        layers: Patterns (`fnmatch`) of the names of parameters that are held; by default all that are trained.
        schedule: Factor of `strength`, asked before every step with the Trainer.
        name: Name of the term in the log, `None` for no log. With a schedule the weight is logged as well.

    Raises:
        ValueError: an argument is out of range; in `fit`, before training: a pattern matches nothing, or the anchor
            has other shapes.
        UnsupportedStrategyError: in `fit`, before training: manual optimization, FSDP1 or DeepSpeed.
        MissingRequirementError: in `fit`, before training: the anchor is not there or lacks parameters, or the training
            is resumed from a checkpoint that was written without this callback.

    >>> from lightning import Trainer
    >>> trainer = Trainer(callbacks=[WeightChangePenalty(strength=1e-3)], max_epochs=1, logger=False)
    """

    functional_form = "lightning_unlearn.functional.weight_change_penalty.weight_change_penalty"

    def __init__(
        self,
        strength: float,
        *,
        anchor: Literal["initial", "moving"] | WeightSource = "initial",
        decay: float = 0.999,
        layers: Sequence[str] | None = None,
        schedule: PenaltySchedule | None = None,
        name: str | None = "weight_change_penalty",
    ) -> None:
        super().__init__(check_positive("strength", strength, zero=True), schedule=schedule, name=name)
        if isinstance(layers, str) or (layers is not None and not layers):
            raise ValueError(expected("layers", "a sequence of patterns, or None for all", layers))
        self._decay = check_fraction("decay", decay)
        self._moving = isinstance(anchor, str) and anchor == "moving"
        named = isinstance(anchor, str) and anchor in ("initial", "moving")
        self._layers = None if layers is None else list(layers)
        self.weight_anchor = WeightAnchor(None if named else anchor, self._layers, moving=self._moving)
        self._steps = 0

    @property
    def state_key(self) -> str:
        """Tells several of them in one Trainer apart."""
        return self._generate_state_key(name=self.name, layers=self._layers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            rule = "one whose parameters keep their names and shapes, on every process or in parts"
            remedy = "Train with DDP or `ModelParallelStrategy` (FSDP2), or use `StandardDeviationPenalty`."
            raise UnsupportedStrategyError(expected("strategy", rule, type(trainer.strategy).__name__, remedy))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the term into the step."""
        super().on_train_start(trainer, pl_module)
        self._steps = trainer.global_step

    def watching(self) -> AbstractContextManager[Any]:
        """Around the user's step: before the first one, the anchor is there, whatever the schedule begins with."""
        if self._fit is not None and self._weight > 0:
            self.weight_anchor.settle(self._fit[0])
        return super().watching()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the anchor that the checkpoint holds, or names."""
        self.weight_anchor.resume(state_dict["anchor"])

    def state_dict(self) -> dict[str, Any]:
        """The anchor, where nothing else holds it."""
        state = self.weight_anchor.state()
        return {"anchor": state} if state else {}

    def penalty(self, weight: float) -> Tensor:
        """The penalty at the weights of the step."""
        parameters, anchors = self.weight_anchor.current()
        return weight_change_penalty(parameters, anchors, weight)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let a moving anchor follow."""
        if self._moving and trainer.global_step != self._steps and self._weight > 0:
            self.weight_anchor.follow(self._decay)
        self._steps = trainer.global_step
