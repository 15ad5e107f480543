"""Data and trainings of `metric_sanity.py`: originals with what methods make of them, and retrained models.

One forget set of rows serves two scenarios, with the right labels and with wrong ones. Without these rows the two are
the same data, so they share their retrained models.
"""

from __future__ import annotations

import logging
import warnings
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from compare_data import Data, Task, make_task, network_for
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_unlearn import FineTune, UnlearningDataModule, unlearn
from lightning_unlearn.methods import NegGradPlus, ScrubR, UnlearningMethod
from lightning_unlearn.procedures.train_many import train_many
from lightning_unlearn.procedures.trained_members import TrainedMembers

__all__ = ["METHODS", "SCENARIOS", "SHADOW", "Size", "Trained", "make_setting", "members_for", "train_all"]

SCENARIOS = ("mislabelled", "class", "random")
METHODS = ("FineTune", "NegGradPlus", "ScrubR")
SHADOW = -1
"""The retrained model that only the privacy risk score uses."""

CLASS = 3
ROWS = {"digits": (1200, 250, 347), "fashion-mnist": (3000, 600, 800)}
"""Training, validation and test images."""

SHARE = 0.05
"""Of the training rows, to forget in the scenarios of rows."""


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        replicates: Independent repetitions of every comparison of groups.
        group: Models in each group.
        epochs: Length of a training, by data set.
    """

    replicates: int
    group: int
    epochs: dict[str, int]


@cache
def make_setting(dataset: str, scenario: str, epochs: int, root: str | None) -> Task:
    """Training data with the labels of the scenario, and what to forget of them; the same for every model."""
    base = make_task(dataset, "random", 0, root)
    parts = (base.train, base.val, base.test)
    train, val, test = (TensorDataset(*part[:n]) for part, n in zip(parts, ROWS[dataset], strict=True))
    images, labels = train.tensors
    if scenario == "class":
        forget = torch.nonzero(labels == CLASS).flatten()
        return Task(train, val, test, forget.tolist(), 10, epochs)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    forget = order[: round(SHARE * len(labels))].sort().values
    if scenario == "random":
        return Task(train, val, test, forget.tolist(), 10, epochs)
    wrong, true = labels.clone(), labels[forget]
    wrong[forget] = true ^ 1  # 0 and 1 swapped, 2 and 3, and so on
    return Task(TensorDataset(images, wrong), val, test, forget.tolist(), 10, epochs, true)


def _trainer(**length: Any) -> dict[str, Any]:
    quiet = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False
    }  # fmt: skip
    return {"accelerator": "cpu", "devices": 1, **quiet, **length}


def _silence() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def retrain(member: int, *, dataset: str, without: str, epochs: int, root: str | None) -> LightningModule:
    """A model that never saw the rows, or the class; `train_many` seeds it."""
    _silence()
    task = make_setting(dataset, without, epochs, root)
    module = network_for(task)()
    split = UnlearningDataModule(Data(task), task.forget)
    Trainer(**_trainer(max_epochs=epochs)).fit(module, datamodule=split.retain_only())
    return module


def train_original(
    member: int, *, dataset: str, scenarios: list[str], epochs: int, root: str | None
) -> dict[str, dict[str, Tensor]]:
    """Weights of a model that saw everything, and of what every method makes of it in scenarios of the same data."""
    _silence()
    task = make_setting(dataset, scenarios[0], epochs, root)
    module = network_for(task)()
    Trainer(**_trainer(max_epochs=epochs)).fit(module, datamodule=Data(task))
    found = {"original": module.state_dict()}
    for scenario in scenarios:
        data = Data(make_setting(dataset, scenario, epochs, root))
        methods: tuple[UnlearningMethod, ...] = (FineTune(), NegGradPlus(), ScrubR())
        for name, method in zip(METHODS, methods, strict=True):
            result = unlearn(
                module, data.task.forget, method=method, data=data, trainer=_trainer(), seed=member, force=True,
                probe_samples=0,
            )  # fmt: skip
            found[f"{scenario}/{name}"] = result.model.state_dict()
    return found


@dataclass(frozen=True)
class Trained:
    """All models of one data set.

    Attributes:
        right: Originals of the right labels.
        wrong: Originals that saw wrong ones.
        rows: Retrained without the rows.
        class_: Retrained without the class.
    """

    right: TrainedMembers
    wrong: TrainedMembers
    rows: TrainedMembers
    class_: TrainedMembers

    @property
    def seconds(self) -> float:
        """Of all trainings, one after the other."""
        return sum(sum(runs.seconds) for runs in (self.right, self.wrong, self.rows, self.class_))

    def of(self, scenario: str) -> tuple[TrainedMembers, TrainedMembers]:
        """Originals and retrained models."""
        return (self.wrong if scenario == "mislabelled" else self.right), (
            self.class_ if scenario == "class" else self.rows
        )


def members_for(size: Size, replicate: int, role: int) -> list[int]:
    """Retrained members of a role (0 reference, 1 second, 2 third) in a replicate; no member has two of them."""
    first = (3 * replicate + role) * size.group
    return list(range(first, first + size.group))


def train_all(dataset: str, size: Size, root: str | None, folder: str, pool: Executor) -> Trained:
    """Train what is not in the folder."""
    root = None if dataset == "digits" else root  # or a path that is not used would be part of the keys
    common = {"dataset": dataset, "epochs": size.epochs[dataset], "root": root}
    how: dict[str, Any] = {"folder": folder, "executor": pool}
    originals, retrained = range(size.replicates * size.group), range(3 * size.replicates * size.group)
    return Trained(
        right=train_many(partial(train_original, scenarios=["random", "class"], **common), originals, **how),
        wrong=train_many(partial(train_original, scenarios=["mislabelled"], **common), originals, **how),
        rows=train_many(partial(retrain, without="random", **common), [SHADOW, *retrained], **how),
        class_=train_many(partial(retrain, without="class", **common), retrained, **how),
    )
