"""What a relearn time is: the setting it holds for, a run that ended or was ended, and two runs compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning_unlearn.results import to_dict
from lightning_unlearn.utilities.checks import check_positive, check_positive_int

__all__ = ["RELEARN_SETTINGS", "RelearnEnd", "RelearnResult", "RelearnRun", "RelearnSetting"]

RelearnEnd: TypeAlias = Literal["relearned", "capped", "diverged"]
"""At or below the threshold; not there when the last epoch was over; a loss that is not finite."""


@dataclass(frozen=True, slots=True)
class RelearnSetting:
    """How a model is trained again, and when it counts as having relearned.

    Attributes:
        learning_rate: Of plain SGD: no momentum, no weight decay, no schedule.
        threshold: The mean loss on the forgotten samples, in the loss's own unit, that ends the run from above.
        max_epochs: The cap; a run that reaches it has no relearn time.
        samples_per_epoch: Samples in an "epoch", drawn with replacement from the training data.
        batch_size: Samples in a step; `None` is the training loader's own.
        check_every: Steps between two looks at the loss; `None` looks at the end of every epoch, as the papers do.
        penalty: Factor of the squared distance to the weights at the start, which is added to the loss.

    Raises:
        ValueError: a number is out of range.
    """

    learning_rate: float
    threshold: float = 0.1
    max_epochs: int = 100
    samples_per_epoch: int = 500
    batch_size: int | None = None
    check_every: int | None = None
    penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "threshold"):
            check_positive(name, getattr(self, name))
        check_positive("penalty", self.penalty, zero=True)
        for name in ("max_epochs", "samples_per_epoch", "batch_size", "check_every"):
            value = getattr(self, name)
            if value is not None or name in ("max_epochs", "samples_per_epoch"):
                check_positive_int(name, value)


RELEARN_SETTINGS: Mapping[str, RelearnSetting] = {
    "golatkar": RelearnSetting(learning_rate=0.01),
    "scrub": RelearnSetting(learning_rate=0.1),
}
"""Name -> setting of the papers' calls. Their functions also know a threshold of 0.01 and a cap of 500, and a penalty
whose factor their callers choose; batches are of the loader's size here."""


@dataclass(frozen=True, slots=True)
class RelearnRun:
    """One model, trained again.

    Attributes:
        end: How the run ended.
        steps_taken: Optimizer steps until then.
        epochs_taken: Epochs begun until then.
        losses: Mean loss on the forgotten samples at every look, the first one before any step.

    >>> print(RelearnRun("relearned", 8, 2, (1.2, 0.4, 0.1)))
    8 steps (2 epochs)
    >>> run = RelearnRun("capped", 400, 100, (1.2, 0.4))
    >>> print(run, run.steps)
    no number: the loss is still 0.4 at the cap of 100 epochs (400 steps) None
    """

    end: RelearnEnd
    steps_taken: int
    epochs_taken: int
    losses: tuple[float, ...]

    @property
    def steps(self) -> int | None:
        """Steps until the samples were relearned; `None` where they were not: a cap is no relearn time."""
        return self.steps_taken if self.end == "relearned" else None

    @property
    def epochs(self) -> int | None:
        """Epochs begun until the samples were relearned; `None` where they were not."""
        return self.epochs_taken if self.end == "relearned" else None

    def __str__(self) -> str:
        steps = f"{self.steps_taken} {'step' if self.steps_taken == 1 else 'steps'}"
        epochs = f"{self.epochs_taken} {'epoch' if self.epochs_taken == 1 else 'epochs'}"
        if self.end == "relearned":
            return f"{steps} ({epochs})"
        if self.end == "capped":
            return f"no number: the loss is still {self.losses[-1]:.3g} at the cap of {epochs} ({steps})"
        return f"no number: the loss is not finite after {steps}"


@dataclass(frozen=True, slots=True)
class RelearnResult:
    """The relearn time of a model, next to the retrained model's, which is the right value.

    Attributes:
        model: The model under test.
        retrained: The retrained model under the same draws of data, `None` where there was none.
        setting: What both runs hold for.
        seed: Of the draws.

    >>> run = RelearnRun("relearned", 8, 2, (1.2, 0.4, 0.1))
    >>> RelearnResult(run, RelearnRun("relearned", 16, 4, (1.4, 0.1)), RelearnSetting(0.1), 0).ratio
    0.5
    """

    model: RelearnRun
    retrained: RelearnRun | None
    setting: RelearnSetting
    seed: int

    @property
    def ratio(self) -> float | None:
        """Steps of the model by those of the retrained one, 1 being right; `None` unless both are numbers.

        The form of the anamnesis index (AIN), whose authors end runs by an accuracy, not by a loss. A retrained model
        that needs 0 steps has no ratio either.
        """
        if self.retrained is None or self.model.steps is None or not self.retrained.steps:
            return None
        return self.model.steps / self.retrained.steps

    @property
    def verdict(self) -> str:
        """The comparison in words."""
        start = f"Relearn time: {self.model}."
        if self.retrained is None:
            return f"{start} There is no retrained model to compare it with, so no value is known to be right."
        return (
            f"{start} Right is the retrained model's: {self.retrained}. {self._ratio_words()} One seed: how much this "
            "varies was not measured."
        )

    def _ratio_words(self) -> str:
        if self.ratio is None:
            if self.retrained is not None and self.retrained.steps == 0:
                return "No ratio: a model that never saw the samples is at the threshold already, so it tells nothing."
            return "No ratio: it takes two numbers."
        if self.ratio == 1:
            return "Ratio 1: just as fast."
        pace = "faster" if self.ratio < 1 else "more slowly"
        return f"Ratio {self.ratio:.3g}: it relearns {pace} than a model that never saw the samples."

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data for JSON, with steps, epochs, ratio and verdict."""
        plain = dict(to_dict(self))
        for name, run in (("model", self.model), ("retrained", self.retrained)):
            if run is not None:
                plain[name] = {**plain[name], "steps": run.steps, "epochs": run.epochs}
        return {**plain, "ratio": self.ratio, "verdict": self.verdict}
