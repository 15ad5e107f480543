"""`UnlearningMetrics`: one metric on the forget, retain and test data at once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MultilabelAccuracy

from lightning_unlearn.metrics.agreement import AgreeingMetric
from lightning_unlearn.metrics.gathering import gather_uneven
from lightning_unlearn.results import Target
from lightning_unlearn.types import Split
from lightning_unlearn.utilities.checks import check_choice, expected

__all__ = ["UnlearningMetrics"]

_SPLITS: tuple[Split, ...] = ("forget", "retain", "test")


def _has_no_samples(target: Any) -> bool:
    """Whether a batch is empty, as one of padding alone is without its padding; not every metric copes with it."""
    return isinstance(target, Tensor) and target.numel() == 0


def _default_base(task: str, num_classes: int | None, num_labels: int | None) -> Metric:
    """Accuracy as papers on unlearning use it: the share of right answers, not the mean over classes."""
    check_choice("task", task, ("binary", "multiclass", "multilabel"))
    if task == "binary":
        return BinaryAccuracy()
    name, size = ("num_classes", num_classes) if task == "multiclass" else ("num_labels", num_labels)
    if size is None:
        raise ValueError(expected(name, f"given for task {task!r}", None, "Or pass your own metric as `base`."))
    if task == "multiclass":
        return MulticlassAccuracy(num_classes=size, average="micro")
    return MultilabelAccuracy(num_labels=size, average="micro")


class UnlearningMetrics(AgreeingMetric):
    """Forget, retain and test accuracy (or any other metric of predictions and targets), routed by split.

    The right value of each is the *retrained* model's. A forget accuracy below it is over-forgetting, not success.

    Only splits that were seen appear in the result. Under several processes a split counts as seen when any of them
    saw it, and all of them then take part in its computation, so an uneven sharding neither blocks nor changes a value.
    Samples that a distributed sampler repeats, to give every process the same number, would count twice: leave them out
    with :func:`lightning_unlearn.data.padding.own_samples`.

    Measured (docs/metrics.md): on clean random samples of small networks it already tells the original from a
    retrained model, by a few times what retrainings differ; such networks fit their training samples a little
    better.

    Args:
        base: Metric to compute per split; it is cloned and never touched. Without one, accuracy.
        task: Kind of accuracy where `base` is not given.
        num_classes: Needed for multiclass accuracy.
        num_labels: Needed for multilabel accuracy.
        splits: The splits in the order of the dataloaders, for updates with `dataloader_idx`.
        name: Name of the metric in the keys, `forget_<name>` and so on; by default `accuracy`, or the class name of
            `base` in snake case.
        kwargs: See :class:`torchmetrics.Metric`. The base metric keeps its own settings.

    Raises:
        ValueError: the size that the task needs is missing, or a split is unknown or named twice.

    >>> metric = UnlearningMetrics(num_classes=3)
    >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 2]), split="forget")
    >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), dataloader_idx=2)
    >>> metric.compute()
    {'forget_accuracy': tensor(0.5000), 'test_accuracy': tensor(1.)}
    """

    is_differentiable: bool = False
    full_state_update: bool = False
    target: ClassVar[Target] = "retrained"

    updates: Tensor

    def __init__(
        self,
        base: Metric | None = None,
        *,
        task: Literal["binary", "multiclass", "multilabel"] = "multiclass",
        num_classes: int | None = None,
        num_labels: int | None = None,
        splits: Sequence[Split] = _SPLITS,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not splits or len(set(splits)) != len(splits) or not set(splits) <= set(_SPLITS):
            raise ValueError(expected("splits", f"different names out of {', '.join(map(repr, _SPLITS))}", splits))
        if name is None:
            name = "accuracy" if base is None else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(base).__name__).lower()
        metric = _default_base(task, num_classes, num_labels) if base is None else base
        self.name = name
        self.splits = tuple(splits)
        self.metrics = nn.ModuleDict({split: metric.clone() for split in splits})
        for split in splits:
            clone = self._of(split)
            clone.reset()
            if clone.dist_sync_fn is None:
                clone.dist_sync_fn = partial(gather_uneven, ragged=True)
        self.add_state("updates", torch.zeros(len(splits), dtype=torch.long), dist_reduce_fx="sum")

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """What the base metric says of itself; true where it does not say."""
        declared = self._of(self.splits[0]).higher_is_better
        return True if declared is None else declared

    def _of(self, split: str) -> Metric:
        metric = self.metrics[split]
        if not isinstance(metric, Metric):
            raise TypeError(expected(split, "a torchmetrics metric", type(metric).__name__))
        return metric

    def _resolve(self, split: Split | None, dataloader_idx: int | None) -> Split:
        if (split is None) == (dataloader_idx is None):
            given = {"split": split, "dataloader_idx": dataloader_idx}
            raise ValueError(expected("split or dataloader_idx", "given, exactly one of the two", given))
        if split is not None:
            return check_choice("split", split, self.splits)
        if dataloader_idx is None or not 0 <= dataloader_idx < len(self.splits):
            raise ValueError(
                expected("dataloader_idx", f"a position in {self.splits}", dataloader_idx, "Declare `splits` in order.")
            )
        return self.splits[dataloader_idx]

    def _named(self, split: Split, value: Any) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return {f"{split}_{key}": item for key, item in value.items()}
        return {f"{split}_{self.name}": value}

    def update(self, preds: Any, target: Any, *, split: Split | None = None, dataloader_idx: int | None = None) -> None:
        """Add predictions and targets, in the form the base metric takes, of one split; an empty batch adds nothing.

        Raises:
            ValueError: neither or both of `split` and `dataloader_idx` are given, or it is not a declared one.
        """
        where = self._resolve(split, dataloader_idx)
        if _has_no_samples(target):
            return
        self._of(where).update(preds, target)
        self.updates[self.splits.index(where)] += 1

    def forward(
        self, preds: Any, target: Any, *, split: Split | None = None, dataloader_idx: int | None = None
    ) -> dict[str, Any]:
        """Add a batch and return the value of this batch alone, under the split's key; nothing for an empty one."""
        where = self._resolve(split, dataloader_idx)
        if _has_no_samples(target):
            return {}
        value = self._of(where)(preds, target)
        self.updates[self.splits.index(where)] += 1
        self._update_count += 1
        self._computed = None
        return self._named(where, value)

    def _no_value(self) -> Any:
        return {}

    def compute(self) -> dict[str, Any]:
        """Values by key for the splits that were seen, in the declared order; empty before the first update."""
        result: dict[str, Any] = {}
        with warnings.catch_warnings():
            # A process without samples of a split must join its computation, and has nothing to be warned of.
            warnings.filterwarnings("ignore", message=".*was called before the ``update`` method.*")
            for position, split in enumerate(self.splits):
                if self.updates[position] > 0:
                    result |= self._named(split, self._of(split).compute())
        return result

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Merge another metric of this class with the same splits.

        Raises:
            ValueError: it is not one.
        """
        if not isinstance(incoming_state, UnlearningMetrics) or incoming_state.splits != self.splits:
            raise ValueError(expected("incoming_state", f"UnlearningMetrics over {self.splits}", incoming_state))
        for position, split in enumerate(self.splits):
            if incoming_state.updates[position] > 0:
                if self.updates[position] > 0:
                    self._of(split).merge_state(incoming_state._of(split))
                else:
                    self.metrics[split] = incoming_state._of(split).clone()
        self.updates += incoming_state.updates.to(self.updates)
        self._update_count += incoming_state._update_count
        self._computed = None

    def reset(self) -> None:
        """Forget everything that was added, on every split."""
        super().reset()
        for split in self.splits:
            metric = self._of(split)
            metric.reset()
            # Off in torchmetrics after a batch that was refused within `forward`: other processes would wait for it.
            metric._to_sync, metric._should_unsync = metric.sync_on_compute, True

    def persistent(self, mode: bool = False) -> None:
        """Set whether states, those of the base metrics included, are part of `state_dict`."""
        super().persistent(mode)
        for split in self.splits:
            self._of(split).persistent(mode)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one result of `compute` or a list of them; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
