"""SCRUB+R: SCRUB that goes back to the epoch after which it had forgotten as much as it should."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods.base import Requirement, hyperparameters
from lightning_unlearn.methods.loss_method import StopRule, UnlearningHost
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.scrub import Scrub
from lightning_unlearn.methods.search_space import FloatRange, IntRange, SearchSpace
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.whole_weights import reshard

__all__ = ["ScrubR"]


@register
@hyperparameters
class ScrubR(Scrub):
    r"""SCRUB+R: run `Scrub`, and then return to the weights whose error on the forget data is what it should be.

    Rule: keep the weights after every pass over the retain data, with their error on the forget data. The reference is
    the error of the *final* model on validation data of the classes in the forget data, as a model that never saw the
    forget data would err on them. The weights whose forget error is nearest to it are the result; of equals the last,
    which is repaired best.

    Guarantee: heuristic. A higher error than that of unseen data is a mark of what was forgotten; this undoes it.

    Cost: as `Scrub`, one look at the forget data an epoch, two at the validation data, and a copy of the weights in
    main memory for every epoch.

    Fails: where the forget data have classes that validation data lack, which is refused; where few of them make the
    error coarse; where errors say little (the answer is right and surer than it should be). With a whole class to
    forget the reference is what the final model makes of that class, which a retrained model would always miss: use
    `Scrub`.

    Differs from code in use: the original itself cannot be chosen, for which the code saves no weights either; no rule
    for equal errors is stated there. Not recorded in a store: it moves weights outside of steps.

    Args:
        epochs: As in `Scrub`; 5 (ours), so that there is something to choose from.
        msteps: As in `Scrub`; 3 (ours), because what goes too far is taken back.
        alpha: As in `Scrub`.
        gamma: As in `Scrub`.
        temperature: As in `Scrub`.
        max_divergence: As in `Scrub`.
        optimizer: As in `Scrub`.
        lr_scale: As in `Scrub`.
        forget_statistics: As in `Scrub`.

    Raises:
        MissingRequirementError: at fit start, no validation data of the forget data's classes, or targets that are no
            class numbers.

    Source: Kurmanji et al. 2023, arXiv 2302.09880.

    >>> ScrubR().stop is None, ScrubR().epochs
    (True, 5)
    """

    requires: ClassVar[frozenset[Requirement]] = Scrub.requires | {Requirement.VALIDATION_DATA}
    recordable: ClassVar[bool] = False
    search_space: ClassVar[SearchSpace] = {
        "lr_scale": FloatRange(0.02, 2, log=True),
        "epochs": IntRange(4, 8),
        "msteps": IntRange(1, 4),
        "alpha": FloatRange(0.0005, 0.5, log=True),
    }

    epochs: int = 5
    msteps: int = 3
    stop: StopRule = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._classes: set[int] = set()
        self._kept: list[tuple[float, dict[str, Tensor]]] = []
        self._remarks: list[str] = []

    def prepare(self, host: UnlearningHost) -> None:
        """Freeze the teacher, and see that the reference can be computed."""
        super().prepare(host)
        self._kept, self._remarks = [], []
        self._classes = _classes(host, "forget")
        missing = sorted(self._classes - _classes(host, "held_out"))
        if missing:
            rule = "validation data of every class in the forget data"
            raise MissingRequirementError(expected("data", rule, f"none of {shorten(missing)}", "Use Scrub."))

    def end_epoch(self, host: UnlearningHost) -> None:
        """Keep the weights, where the pass was over the retain data."""
        if "retain" in self.schedule[host.current_epoch]:
            weights = {name: one.detach().cpu().clone() for name, one in _tensors(host).items()}
            self._kept.append((self._error(host, "forget"), weights))

    def conclude(self, host: UnlearningHost) -> None:
        """Go back to the weights that have forgotten as much as they should."""
        if not self._kept:
            return  # the pass was ended before the first of them
        # Every process has looked at the same data, with running statistics of its own.
        reference, errors = host.agreed((self._error(host, "held_out"), [error for error, _ in self._kept]))
        chosen = min(reversed(range(len(errors))), key=lambda epoch: abs(errors[epoch] - reference))
        with torch.no_grad():
            for name, tensor in _tensors(host).items():
                tensor.copy_(self._kept[chosen][1][name])
        text = (
            f"ScrubR went back to the weights after epoch {chosen + 1} of {len(errors)}, whose error on the forget "
            f"data ({errors[chosen]:.3f}) is nearest to that of the final weights on validation data ({reference:.3f})."
        )
        self._remarks = [text]

    def remarks(self) -> list[str]:
        """Which epoch was chosen, and by what."""
        return self._remarks

    def finish(self, host: UnlearningHost) -> None:
        """Let go of the teacher and the weights."""
        super().finish(host)
        self._kept = []

    def _error(self, host: UnlearningHost, part: Part | Literal["held_out"]) -> float:
        """Share of wrong answers among the samples of the forget data's classes."""
        wrong = total = 0
        classes = torch.tensor(sorted(self._classes))
        with host.differentiable() as (_, outputs):
            for batch in host.part_loader(part):
                logits, targets = outputs(batch)
                counted = torch.isin(targets, classes.to(targets.device))
                wrong += int((logits.detach().argmax(1) != targets)[counted].sum())
                total += int(counted.sum())
        return wrong / total


def _classes(host: UnlearningHost, part: Part | Literal["held_out"]) -> set[int]:
    """The classes in some data; negative numbers are none."""
    found: set[int] = set()
    with host.differentiable() as (_, outputs):
        for batch in host.part_loader(part):
            _, targets = outputs(batch)
            if targets.is_floating_point():
                raise MissingRequirementError(
                    expected("targets", "class numbers for ScrubR", targets.dtype, "Use Scrub.")
                )
            found.update(one for one in targets.flatten().tolist() if one >= 0)
    return found


def _tensors(host: UnlearningHost) -> dict[str, Tensor]:
    reshard(cast(nn.Module, host))  # what is gathered after a look at the data is a copy
    return {**dict(host.named_parameters()), **dict(cast(nn.Module, host).named_buffers())}
