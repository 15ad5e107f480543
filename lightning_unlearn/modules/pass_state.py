"""What a facade around a user's module knows beyond that module's own state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning import LightningModule

from lightning_unlearn.methods.loss_method import LossMethod
from lightning_unlearn.modules.metrics_swap import MetricCopies
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.batch_adapter import BatchAdapter
from lightning_unlearn.utilities.batch_norm import StatisticsPolicy
from lightning_unlearn.utilities.batches import leading_size
from lightning_unlearn.utilities.masked_updates import MaskedUpdate

__all__ = ["PassState"]


@dataclass
class PassState:
    """A pass under way. It never enters the user's `__dict__`.

    Attributes:
        user: The user's module.
        method: What is minimised.
        adapter: How inputs, targets and logits come out of a batch.
        active: Whether the wrapper is in force.
        silent: Whether logging is ignored.
        part: The part whose batch the user's code sees at the moment.
        parts: Parts of the step's batch.
        batch: That part's batch.
        retain_output: What the user's step returned for the retain part.
        ran_on_retain: Whether it ran on the retain part in this step.
        ran_this_epoch: The same for the epoch.
        forget_metrics: Metric objects of the forget part.
        prepared: Whether the method has something to let go of.
        iteration: Optimizer steps made.
        update: The step under way, where it may change some entries only.
        stop_listening: Takes hooks off the optimizers.
        skeleton: The user's module without its weights, from before it was sharded; `None` where it is not sharded.
    """

    user: LightningModule
    method: LossMethod
    adapter: BatchAdapter
    active: bool = True
    silent: bool = False
    part: Part | None = None
    parts: tuple[Part, ...] = ()
    batch: Any = None
    retain_output: Any = None
    ran_on_retain: bool = False
    ran_this_epoch: bool = False
    forget_metrics: MetricCopies = field(default_factory=MetricCopies)
    prepared: bool = False
    iteration: int = 0
    update: MaskedUpdate = field(default_factory=MaskedUpdate)
    stop_listening: list[Callable[[], None]] = field(default_factory=list)
    skeleton: LightningModule | None = None

    def policy(self, batch: Any) -> StatisticsPolicy | None:
        """What normalisation layers do with forget batches; `None` for what they do in training."""
        choice = self.method.forget_statistics
        if choice == "auto":
            # A batch of one sample has no statistics.
            return "batch" if "retain" in self.parts and leading_size(batch) != 1 else "running"
        return None if choice == "update" else choice

    def finish(self, host: Any) -> None:
        """Take hooks off, and have the method let go of what it has prepared; may be called again."""
        for stop in self.stop_listening:
            stop()
        self.stop_listening.clear()
        if self.prepared:
            self.prepared = False
            self.method.finish(host)
