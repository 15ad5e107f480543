"""How hard unlearning is becoming, live: the unlearning error of Thudi et al. and what it is made of."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from lightning_unlearn.callbacks.anchor_sources import WeightSource
from lightning_unlearn.callbacks.loss_curvature import LossCurvature
from lightning_unlearn.callbacks.weight_anchor import Anchored, WeightAnchor
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.functional.power_iteration import CurvatureEstimator, curvature_estimate
from lightning_unlearn.functional.unlearning_error import unlearning_error_from_distance
from lightning_unlearn.functional.weight_distance import verification_error
from lightning_unlearn.modules.silent import transferred
from lightning_unlearn.utilities.checks import check_choice, check_positive, check_positive_int, expected

__all__ = ["UnlearningErrorMonitor", "UnlearningErrorRecord"]


@dataclass(frozen=True, slots=True)
class UnlearningErrorRecord:
    """One measurement.

    Attributes:
        step: Optimizer steps since the anchor.
        distance: L2 distance of the trainable parameters to the anchor.
        singular_value: The largest of the Hessian, or what `estimator` makes of it.
        eigenvalue: The eigenvalue it belongs to, negative where the loss is most curved downwards.
        mean_singular_value: Mean of `singular_value` over all measurements so far.
        unlearning_error: Of the steps so far, with the mean; 0 after one step.
        iterations: Of the power iteration: products with the Hessian, two backward passes each.
        converged: Whether it did.
        seconds: What this measurement cost.
    """

    step: int
    distance: float
    singular_value: float
    eigenvalue: float
    mean_singular_value: float
    unlearning_error: float
    iterations: int
    converged: bool
    seconds: float


class UnlearningErrorMonitor(Anchored):
    r"""Logs the running unlearning error :math:`\eta^2 \lVert w_t - w_0 \rVert \bar\sigma (t - 1) / 2` of a training.

    It is a proxy of how far single-gradient unlearning would miss the retrained weights: it orders trainings, and does
    not bound the distance (Thudi et al. 2021). Its parts: the distance travelled, and the largest singular value of the
    Hessian of the loss in use (penalties that callbacks add belong to it) on a held batch, averaged over measurements.

    Measured after the first step, after every `every_n_steps` more, and at the end. The training is bitwise that
    without the monitor. The theory is about SGD with a constant rate: with a schedule :math:`\eta^2` is the mean over
    the steps, with several parameter groups the largest rate counts, and with momentum or an adaptive optimizer the
    rate is taken all the same; these are our readings and not the paper's. Approximate in any case.

    Works on one device and under DDP, where it gives the figure of one process with all samples. Refused where weights
    are sharded, and with manual optimization.

    Logged: `name` itself, and with `_distance`, `_singular_value` and `_share_of_time` (of the training so far) behind
    it. `history` holds everything, also without a logger.

    Args:
        every_n_steps: Optimizer steps between measurements; one costs up to `max_iterations` times two backward passes.
        at_epoch_end: Measure after every epoch as well.
        batch: What the Hessian is measured on: `"first"`, the first batch of the fit (of every process), kept; that in
            hand, `"current"`; or a batch of one's own, as the loader gives it. The first batch of a resumed fit is
            another: batches are personal data and not put into checkpoints.
        estimator: `"singular_value"`, or `"sqrt_eigenvalue"` as the authors' code (see `curvature_estimate`).
        lr: The learning rate; by default that of every step.
        anchor: :math:`w_0`: the weights that the training starts from, or as for `WeightChangePenalty`.
        max_iterations: Of the power iteration.
        tolerance: Relative change that ends it.
        seed: Of its first vector.
        name: Name in the log.

    Attributes:
        history: A list of `UnlearningErrorRecord`, also of the part of a training before it was resumed.

    Raises:
        ValueError: an argument is out of range.
        UnsupportedStrategyError: in `fit`, before training: another strategy, or manual optimization; after the first
            step: a loss that cannot be differentiated twice.
        MissingRequirementError: as `WeightChangePenalty`; or there is no loss for the batch.

    Source: Thudi, Deza, Chandrasekaran, Papernot 2022, arXiv 2109.13398.

    >>> from lightning import Trainer
    >>> trainer = Trainer(callbacks=[UnlearningErrorMonitor(every_n_steps=200)], max_epochs=1, logger=False)
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        *,
        at_epoch_end: bool = False,
        batch: Literal["first", "current"] | Any = "first",
        estimator: CurvatureEstimator = "singular_value",
        lr: float | None = None,
        anchor: Literal["initial"] | WeightSource = "initial",
        max_iterations: int = 100,
        tolerance: float = 1e-3,
        seed: int = 0,
        name: str = "unlearning_error",
    ) -> None:
        super().__init__()
        self._every = check_positive_int("every_n_steps", every_n_steps)
        if isinstance(batch, str):
            check_choice("batch", batch, ("first", "current"))
        self._at_epoch_end = at_epoch_end
        self._source = batch
        self._estimator: CurvatureEstimator = check_choice(
            "estimator", estimator, ("singular_value", "sqrt_eigenvalue")
        )
        self._lr = None if lr is None else check_positive("lr", lr)
        self.weight_anchor = WeightAnchor(None if isinstance(anchor, str) and anchor == "initial" else anchor)
        self._curvature = LossCurvature(
            max_iterations=check_positive_int("max_iterations", max_iterations),
            tolerance=check_positive("tolerance", tolerance),
            seed=check_positive_int("seed", seed, zero=True),
        )
        self.name = name
        self.history: list[UnlearningErrorRecord] = []
        self._resumed = False
        self._begin()

    def _begin(self) -> None:
        self._steps, self._rates = 0, 0.0  # rates squared, summed over the steps
        self._global_step, self._rate = 0, 0.0
        self._spent, self._started = 0.0, time.perf_counter()
        self._held: Any = None

    @property
    def state_key(self) -> str:
        """Tells several of them in one Trainer apart."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured."""
        if stage != "fit":
            return
        self._resumed = False
        strategy = trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
            rule = "a single device or DDP, where second derivatives can be had"
            remedy = "Train without `UnlearningErrorMonitor`."
            raise UnsupportedStrategyError(expected("strategy", rule, type(strategy).__name__, remedy))
        if not pl_module.automatic_optimization:
            rule = "optimized automatically, so that its step returns the loss"
            raise UnsupportedStrategyError(
                expected("model", rule, "manual optimization", "Train without `UnlearningErrorMonitor`.")
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint was written."""
        self._resumed = True
        self._begin()
        self._steps, self._rates = state_dict["steps"], state_dict["squared_rates"]
        self.history = [UnlearningErrorRecord(**record) for record in state_dict["history"]]
        if "anchor" in state_dict:
            self.weight_anchor.resume(state_dict["anchor"])

    def state_dict(self) -> dict[str, Any]:
        """Counts, history, and the anchor where nothing else holds it."""
        anchor = self.weight_anchor.state()
        history = [asdict(record) for record in self.history]
        state = {"steps": self._steps, "squared_rates": self._rates, "history": history}
        return {**state, **({"anchor": anchor} if anchor else {})}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        if not self._resumed:
            self._begin()
            self.history = []
        self._global_step = trainer.global_step
        if not isinstance(self._source, str):
            self._held = transferred(pl_module, self._source)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first step, keep the anchor and the batch."""
        self.weight_anchor.settle(trainer)
        if self._held is None and self._source == "first":
            self._held = apply_to_collection(batch, Tensor, Tensor.clone)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the rate of the step that comes; a schedule has moved on when it is over."""
        self._rate = max(float(group["lr"]) for group in optimizer.param_groups) if self._lr is None else self._lr

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, and measure when it is time."""
        if trainer.global_step == self._global_step:
            return  # accumulating, or skipped by a gradient scaler
        self._global_step = trainer.global_step
        self._steps += 1
        self._rates += self._rate**2
        if self._source == "current":
            self._held = batch
        if (self._steps - 1) % self._every == 0:
            self._log(trainer, pl_module, self._measure(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, where that was asked for."""
        if self._at_epoch_end and self._due():
            self._log(trainer, pl_module, self._measure(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights, and give back the batch."""
        if self._due():
            self._measure(trainer, pl_module)
        self._held = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give back the batch."""
        self._held = None

    def _due(self) -> bool:
        """Whether there were steps since the last measurement."""
        return bool(self._steps) and (not self.history or self.history[-1].step != self._steps)

    def _measure(self, trainer: Trainer, module: LightningModule) -> UnlearningErrorRecord:
        started = time.perf_counter()
        top = self._curvature.measure(trainer, module, self._held)
        value = float(curvature_estimate(top, self._estimator))
        mean = math.fsum([*(record.singular_value for record in self.history), value]) / (len(self.history) + 1)
        parameters, anchors = self.weight_anchor.current()
        numbered = [{str(place): one for place, one in enumerate(side)} for side in (parameters, anchors)]
        distance = float(verification_error(*numbered))
        rate = math.sqrt(self._rates / self._steps)
        error = float(unlearning_error_from_distance(distance, lr=rate, steps=self._steps, singular_value=mean))
        seconds = time.perf_counter() - started
        self._spent += seconds
        record = UnlearningErrorRecord(
            step=self._steps,
            distance=distance,
            singular_value=value,
            eigenvalue=top.eigenvalue,
            mean_singular_value=mean,
            unlearning_error=error,
            iterations=top.iterations,
            converged=top.converged,
            seconds=seconds,
        )
        self.history.append(record)
        return record

    def _log(self, trainer: Trainer, module: LightningModule, record: UnlearningErrorRecord) -> None:
        if trainer.barebones:
            return
        share = self._spent / (time.perf_counter() - self._started)
        values = {"": record.unlearning_error, "_distance": record.distance, "_singular_value": record.singular_value}
        for suffix, value in {**values, "_share_of_time": share}.items():
            ends = module._current_fx_name == "on_train_epoch_end"
            module.log(f"{self.name}{suffix}", value, on_step=not ends, on_epoch=ends)
