"""What metrics that compare two groups of models have in common: one update a model, in any order, on any process."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_unlearn.functional.margins import margins
from lightning_unlearn.metrics.agreement import AgreeingMetric
from lightning_unlearn.metrics.gathering import gather_uneven
from lightning_unlearn.utilities.checks import check_choice, check_positive_int, expected
from lightning_unlearn.utilities.fingerprints import fingerprints

__all__ = ["ManyModelsMetric", "ModelGroup"]

ModelGroup: TypeAlias = Literal["unlearned", "retrained"]

_GROUPS: tuple[ModelGroup, ...] = ("unlearned", "retrained")

_LABEL_BITS = 20
"""Of the fingerprint of the targets: few enough to survive `set_dtype`, which makes floats of every state."""


class ManyModelsMetric(AgreeingMetric):
    """Margins of a group of unlearned and a group of retrained models, on the same samples in the same order.

    Margins are kept in the metric's dtype (float32 unless `set_dtype(torch.float64)` was called) and in full. Models
    are told apart by their number, so neither the order of updates nor the process that made them changes the value.
    Processes may hold any models, or none.

    Args:
        kwargs: See :class:`torchmetrics.Metric`.
    """

    is_differentiable: bool = False
    full_state_update: bool = False

    rows: list[Tensor]
    groups: list[Tensor]
    models: list[Tensor]
    labels: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("dist_sync_fn", gather_uneven)
        super().__init__(**kwargs)
        for state in ("rows", "groups", "models", "labels"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, targets: Tensor, *, group: ModelGroup, model: int) -> None:
        """Add all outputs of one model; none at all, as of a process that was dealt no samples, add nothing.

        Args:
            logits: (samples, C), of the same samples in the same order for every model.
            targets: (samples,), integer class numbers.
            group: `"unlearned"` or `"retrained"`.
            model: The model's number in its group, such as its seed.

        Raises:
            ValueError: another group, a negative number, shapes that do not fit, or targets that are not those of the
                models before it.
        """
        check_choice("group", group, _GROUPS)
        check_positive_int("model", model, zero=True)
        if targets.numel() == 0:
            return
        row = margins(logits.detach(), targets).to(self.dtype).unsqueeze(0)
        label = fingerprints(targets.long().unsqueeze(0), 1)[0] % 2**_LABEL_BITS
        if self.labels:
            self._check_labels(torch.cat([self.labels[-1].long(), torch.tensor([label], device=logits.device)]))
        self.rows.append(row)
        for state, value in ((self.groups, _GROUPS.index(group)), (self.models, int(model)), (self.labels, label)):
            state.append(torch.tensor([value], device=logits.device))

    def forward(self, logits: Tensor, targets: Tensor, *, group: ModelGroup, model: int) -> Any:
        """Add all outputs of one model and return NaN: one model alone has no value."""
        self.update(logits, targets, group=group, model=model)
        return torch.full((), math.nan, dtype=torch.float64, device=self.device)

    def _check_labels(self, labels: Tensor) -> None:
        if (labels != labels[0]).any():
            rule, remedy = "the same for every model, in the same order", "Do not shuffle the loader."
            raise ValueError(expected("targets", rule, "different ones", remedy))

    def margins_by_group(self) -> tuple[Tensor, Tensor]:
        """Margins of the unlearned and of the retrained models, (models, samples) each, in the order of their numbers.

        Raises:
            ValueError: a group has no model, a model was added twice, or models saw other samples or another order.
        """
        if not len(self.rows):
            raise ValueError(expected("models", "of both groups", "none", "Call `update` once for every model."))
        groups, models, labels = (dim_zero_cat(state).long() for state in (self.groups, self.models, self.labels))
        self._check_labels(labels)  # those of other processes
        rows = dim_zero_cat(self.rows)
        found = []
        for place, group in enumerate(_GROUPS):
            mine = groups == place
            numbers, order = models[mine].sort()
            if not numbers.numel():
                raise ValueError(expected(group, "a group of at least one model", "none", "Call `update` for it."))
            if (numbers.diff() == 0).any():
                twice = sorted(set(numbers[1:][numbers.diff() == 0].tolist()))
                raise ValueError(expected("model", f"a number that is new in {group!r}", twice, "Number the models."))
            found.append(rows[mine][order])
        return found[0], found[1]

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one result of `compute` or a list of them; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
