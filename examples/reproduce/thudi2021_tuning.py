"""Fine-tuning in pairs: with and without one batch, and what the two weights, and the unlearned ones, have to say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from thudi2021_analysis import file_label
from thudi2021_data import Parts, TuneData, draw
from thudi2021_models import Classifier, build
from thudi2021_settings import Job, Task
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_unlearn import SingleGradient, compare_models, unlearn
from lightning_unlearn.callbacks.unlearning_error_monitor import UnlearningErrorMonitor
from lightning_unlearn.functional.unlearning_error import unlearning_error_from_distance
from lightning_unlearn.functional.weight_distance import verification_error
from lightning_unlearn.procedures.twin import TwinRole, Twins, train_twins

__all__ = [
    "Setting",
    "compared",
    "prepare",
    "pretrain",
    "single_gradient",
    "tune",
    "twins_of",
]

QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "devices": 1,
}  # fmt: skip
Row = dict[str, Any]


class Snapshots(Callback):
    """The weights after each epoch, and the steps until then."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []
        self.steps: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the state."""
        self.after.append({name: tensor.detach().cpu().clone() for name, tensor in pl_module.state_dict().items()})
        self.steps.append(trainer.global_step)


@dataclass(frozen=True)
class Setting:
    """What jobs of one task and seed share: data, the pretrained start, and the batch that is forgotten."""

    task: Task
    parts: Parts
    start: Mapping[str, Tensor] = field(repr=False)
    forget: tuple[int, ...]
    accelerator: str

    @property
    def data(self) -> TuneData:
        """A fresh datamodule."""
        return TuneData(self.parts, self.task.batch_size)

    def module(self, lr: float, gamma: float = 0.0) -> Classifier:
        """The pretrained network, ready to be fine-tuned."""
        network = build(self.task)
        network.load_state_dict(self.start)
        return Classifier(network, lr, gamma)

    def trainer(self, **changes: Any) -> dict[str, Any]:
        """Arguments of a Trainer."""
        return {**QUIET, "accelerator": self.accelerator, "max_epochs": self.task.epochs, **changes}

    @property
    def device(self) -> torch.device:
        """Where models are compared."""
        return torch.device("cuda" if self.accelerator != "cpu" and torch.cuda.is_available() else "cpu")

    def loaders(self) -> dict[str, DataLoader[Any]]:
        """What models are compared on."""
        forget = DataLoader(Subset(self.parts.tune, self.forget), len(self.forget))
        return {"forget": forget, "test": self.data.test_dataloader()}


def _file(task: Task, job: Job, folder: Path) -> Path:
    return folder / f"{file_label(task.name)}-{job.seed}-{job.start:g}.pt"


def pretrain(task: Task, root: Path, job: Job, folder: Path, accelerator: str) -> Row:
    """Train what a job's fine-tuning starts from, and keep it in the folder.

    Returns:
        Its test accuracy.
    """
    _, epochs, batch_size, optimizer, lr = task.pretrain
    parts = draw(task, root, job.seed)
    seed_everything(job.seed, verbose=False)
    module = Classifier(build(task), lr, job.start, optimizer)
    trainer = Trainer(**QUIET, accelerator=accelerator, max_epochs=epochs)
    trainer.fit(module, DataLoader(parts.pretrain, batch_size, shuffle=True, drop_last=True))
    folder.mkdir(parents=True, exist_ok=True)
    target = _file(task, job, folder)
    draft = target.with_suffix(".draft")
    torch.save(module.network.state_dict(), draft)
    os.replace(draft, target)
    loader = DataLoader(parts.test, 500)
    values = compare_models({"start": module}, {"forget": loader, "test": loader}, reference="start")
    parameters = sum(one.numel() for one in module.parameters())
    return {"test_accuracy": values["start"]["test_accuracy"], "parameters": parameters}


def prepare(task: Task, root: Path, job: Job, folder: Path, accelerator: str) -> Setting:
    """The setting of a job; its start is trained again if the file is gone."""
    if not _file(task, job, folder).exists():
        pretrain(task, root, job, folder, accelerator)
    start = torch.load(_file(task, job, folder), weights_only=True)
    batches = task.tune_samples // task.batch_size
    forgotten = int(torch.randint(batches, (), generator=torch.Generator().manual_seed(job.seed)))
    first = forgotten * task.batch_size
    forget = tuple(range(first, first + task.batch_size))
    return Setting(task, draw(task, root, job.seed), start, forget, accelerator)


def single_gradient(
    setting: Setting, model: Classifier, initial: Mapping[str, Tensor], epochs: int
) -> tuple[LightningModule, float]:
    """The paper's update, at its full length, of a model fine-tuned for so many epochs; and the seconds it took."""
    method = SingleGradient(
        initial_weights=initial, lr=model.lr, epochs=epochs, batch_size=setting.task.batch_size, max_relative_norm=None
    )
    result = unlearn(
        model, list(setting.forget), method=method, data=setting.data.train_dataloader(), batch_norm="keep",
        record=False, force=True, probe_samples=0,
    )  # fmt: skip
    return result.model, result.seconds


def twins_of(setting: Setting, job: Job, callbacks: Callable[[TwinRole], Sequence[Callback]] | None = None) -> Twins:
    """Fine-tune with all batches and with all but the forgotten one.

    Raises:
        RuntimeError: something else sets the two apart.
    """
    twins = train_twins(
        partial(setting.module, job.lr, job.gamma), setting.forget, data=setting.data, trainer=setting.trainer(),
        unit="batches", seed=job.seed, callbacks=callbacks,
    )  # fmt: skip
    if not twins.paired:
        raise RuntimeError(f"Expected twins, but got {twins.reasons}.")
    return twins


def tune(setting: Setting, job: Job) -> list[Row]:
    """One pair of fine-tunings; a row for every number of epochs."""
    task = setting.task
    rows = range(task.curvature_samples)
    batch = next(iter(DataLoader(Subset(setting.parts.tune, rows), len(rows))))
    monitor = UnlearningErrorMonitor(every_n_steps=task.curvature_every, batch=batch)
    snapshots = {"original": Snapshots(), "retrained": Snapshots()}

    def callbacks(role: TwinRole) -> list[Callback]:
        return [snapshots[role], monitor] if role == "original" else [snapshots[role]]

    start = twins_of(setting, job, callbacks).initial_weights
    original, retrained = setting.module(job.lr, job.gamma), setting.module(job.lr, job.gamma)
    found = []
    for epochs, (seen, unseen) in enumerate(zip(*(one.after for one in snapshots.values()), strict=True), start=1):
        original.load_state_dict(seen)
        retrained.load_state_dict(unseen)
        single, _ = single_gradient(setting, original, start, epochs)
        models = {"original": original, "single": single, "retrained": retrained}
        distance = float(verification_error(original, start))
        steps = snapshots["original"].steps[epochs - 1]
        values: Row = {"epochs": epochs, "steps": steps, "distance": distance}
        values |= _predicted(monitor.history, distance, job.lr, steps)
        values["edit_norm"] = float(verification_error(single, original))
        values["travel"] = float(verification_error(retrained, start))
        found.append({**values, **_measured(models, setting)})
    return found


def _predicted(history: Sequence[Any], distance: float, lr: float, steps: int) -> Row:
    """The unlearning error at a step, with the mean of the singular values up to it."""
    singular_values = [record.singular_value for record in history if record.step <= steps]
    mean = sum(singular_values) / len(singular_values)
    error = unlearning_error_from_distance(distance, lr=lr, steps=steps, singular_value=mean)
    return {"singular_value": mean, "last_singular_value": singular_values[-1], "error": float(error)}


def compared(models: Mapping[str, LightningModule], setting: Setting, reference: str = "retrained") -> dict[str, Row]:
    """What `compare_models` says of models on the forgotten and the held-out samples."""
    return compare_models(models, setting.loaders(), reference=reference, device=setting.device)


def _measured(models: Mapping[str, LightningModule], setting: Setting) -> Row:
    """Verification errors, accuracies and membership, with the model's name behind them."""

    def items() -> Iterator[tuple[str, float]]:
        for label, values in compared(models, setting).items():
            if label != "retrained":
                yield f"v_{label}", values["verification_error"]
            for name in ("forget_accuracy", "test_accuracy", "membership_auroc"):
                yield f"{name}_{label}", values[name]

    return dict(items())
