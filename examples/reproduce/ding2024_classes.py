"""Forgetting one class: a training, two retrainings, and every pass, with the numbers of the paper's table."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ding2024_settings import Preset, Task
from images import load_images, normalised
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from studies import Row
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

from lightning_unlearn import UnlearningDataModule, unlearn
from lightning_unlearn.exceptions import UnlearningWarning
from lightning_unlearn.functional.classifier_attacks import support_vector_attack
from lightning_unlearn.functional.prediction_scores import attack_features
from lightning_unlearn.functional.score_gaps import SplitScores, average_gap
from lightning_unlearn.methods import CEFineTune, FineTune, ICEFineTune, KLFineTune, LossMethod, RetentionMasking

sys.path.append(str(Path(__file__).parents[1]))

from compare_data import Data, Network
from compare_data import Task as DataTask

__all__ = ["Pass", "class_rows", "fit_rows", "passes"]

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Pass(NamedTuple):
    """One pass of a method.

    Attributes:
        group: Which table or figure it belongs to.
        model: Its name there.
        value: What is varied, 0 where nothing is.
        method: What is run.
    """

    group: str
    model: str
    value: float
    method: LossMethod


def passes(preset: Preset) -> Iterator[Pass]:
    """The package's defaults at one number of steps, the same without an early end, and both sweeps."""
    steps = preset.steps
    yield Pass("default", "fine-tuning", 0, FineTune(max_steps=steps))
    yield Pass("default", "fine-tuning, longer", 0, FineTune(max_steps=preset.long_steps))
    pushing = {"KL-FT": KLFineTune, "ICE-FT": ICEFineTune, "CE-FT": CEFineTune}
    for name, known in pushing.items():
        yield Pass("default", name, 0, known(max_steps=steps))
        yield Pass("default", f"{name}, to the end", 0, known(max_steps=steps, stop=None))
    yield Pass("default", "mask of retain (RBM)", 0, RetentionMasking(max_steps=steps))
    yield Pass("default", "mask of forget", 0, RetentionMasking(max_steps=steps, mask_of="forget"))
    for alpha in preset.alphas:
        for name in ("ICE-FT", "CE-FT"):
            settings: dict[str, Any] = {"lr_scale": preset.alpha_lr_scale, "stop": None, "max_steps": steps}
            yield Pass("alpha", name, alpha, pushing[name](alpha=alpha, **settings))
    for keep in preset.keeps:
        for of in ("retain", "forget"):
            yield Pass("keep", of, keep, RetentionMasking(keep=keep, mask_of=of, max_steps=steps))


class ResNet(Network):
    """ResNet-18 with the 3x3 stem for small images, trained as the small network is."""

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10, epochs: int = 60, lr: float = 0.1) -> None:
        super().__init__(channels, size, classes, epochs, lr)
        self.net = resnet18(num_classes=classes)
        self.net.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.net.maxpool = nn.Identity()


class Drawn(NamedTuple):
    """What a seed draws, and where the class is in it."""

    task: DataTask
    parts: dict[str, TensorDataset]


def draw(task: Task, root: Path, forgotten: int, seed: int) -> Drawn:
    """Images of a seed, the same for every class; test images of the class apart from those of the others.

    Raises:
        ValueError: the data are too few.
    """
    images = load_images(root, task.dataset)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(images.train_labels), generator=generator)
    held = torch.randperm(len(images.test_labels), generator=generator)[: task.test]
    if len(rows) < task.train + task.val or len(held) < task.test:
        raise ValueError(f"Expected more images of {task.dataset}, but got {len(rows)} and {len(held)}.")

    def chosen(pixels: Tensor, labels: Tensor, positions: Tensor) -> TensorDataset:
        return TensorDataset(normalised(pixels[positions], task.dataset), labels[positions])

    train, val = rows[: task.train], rows[task.train : task.train + task.val]
    wanted, out = images.train_labels[train] == forgotten, images.test_labels[held] == forgotten
    parts = {
        "forget": chosen(images.train, images.train_labels, train[wanted]),
        "retain": chosen(images.train, images.train_labels, train[~wanted]),
        "test": chosen(images.test, images.test_labels, held[~out]),
        "class": chosen(images.test, images.test_labels, held[out]),
    }
    return Drawn(
        DataTask(
            train=chosen(images.train, images.train_labels, train),
            val=chosen(images.train, images.train_labels, val),
            test=parts["test"],
            forget=torch.nonzero(wanted).flatten().tolist(),
            classes=10,
            epochs=task.epochs,
        ),
        parts,
    )


def trained(task: Task, data: LightningDataModule, seed: int, accelerator: str) -> tuple[LightningModule, float]:
    """A training from the start that the seed draws, and the seconds it took."""
    seed_everything(seed, workers=True, verbose=False)
    channels, size = (3, 32) if task.dataset == "CIFAR-10" else (1, 28)
    module = {"small": Network, "resnet-18": ResNet}[task.network](channels, size, 10, task.epochs, task.lr)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have no `validation_step`")  # that loader is for the stopping rules
        Trainer(max_epochs=task.epochs, accelerator=accelerator, devices=1, **QUIET).fit(module, datamodule=data)
    return module, time.perf_counter() - started


@torch.no_grad()
def answers(module: nn.Module, data: TensorDataset) -> Tensor:
    """Logits (N, classes) in eval mode."""
    device = next(module.parameters()).device
    module.eval()
    return torch.cat([module(part.to(device)).cpu() for part in data.tensors[0].split(500)])


def scores(module: nn.Module, parts: dict[str, TensorDataset], attack_samples: int) -> Row:
    """UA, RA, TA, accuracy on test images of the class, and the efficacy of the attack, as shares.

    The attack is that of Unlearn-Sparse and SalUn on the confidence. Members are retain images, non-members test images
    of the other classes.
    """
    logits = {name: answers(module, part) for name, part in parts.items()}
    right = {name: float((logits[name].argmax(1) == part.tensors[1]).double().mean()) for name, part in parts.items()}
    forget, retain, test = (
        attack_features(logits[name], parts[name].tensors[1], "confidence") for name in ("forget", "retain", "test")
    )
    attack = support_vector_attack(forget=forget, retain=retain[:attack_samples], test=test[:attack_samples])
    return {
        "ua": 1 - right["forget"], "ra": right["retain"], "ta": right["test"], "class_accuracy": right["class"],
        "mia": attack.efficacy, "member_advantage": attack.retain - attack.test,
    }  # fmt: skip


def forgotten_by(
    method: LossMethod, original: LightningModule, drawn: Drawn, preset: Preset, batch_size: int, seed: int
) -> Row:
    """Scores of a pass, with its seconds and steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnlearningWarning)  # what is warned of is in the table
        result = unlearn(
            original,
            drawn.task.forget,
            method=method,
            data=Data(drawn.task, batch_size),
            trainer={"accelerator": preset.accelerator, "devices": 1, **QUIET},
            seed=seed,
            record=False,
            probe_samples=0,
            force=True,  # what a method does to the model is to be seen here, not prevented
        )
    row = scores(result.model, drawn.parts, preset.attack_samples)
    return {**row, "seconds": result.seconds, "steps": sum(stage.steps for stage in result.stages)}


def class_rows(preset: Preset, name: str, root: Path, forgotten: int, seed: int) -> list[Row]:
    """All models of one data set, class and seed."""
    task = preset.task(name)
    drawn = draw(task, root, forgotten, seed)

    def data() -> LightningDataModule:
        return Data(drawn.task, task.batch_size)

    def without() -> LightningDataModule:
        return UnlearningDataModule(data(), drawn.task.forget, seed=seed).retain_only()

    original, _ = trained(task, data(), seed, preset.accelerator)
    retrained, seconds = trained(task, without(), seed, preset.accelerator)
    other, _ = trained(task, without(), 1000 + seed, preset.accelerator)
    found: list[Row] = []
    for label, module in (("original", original), ("retrained", retrained), ("retrained, another start", other)):
        row = scores(module, drawn.parts, preset.attack_samples)
        spent = None if label == "original" else seconds
        found.append({"group": "reference", "model": label, "value": 0, **row, "seconds": spent, "steps": None})
    found += [
        {**one._asdict(), **forgotten_by(one.method, original, drawn, preset, task.batch_size, seed)}
        for one in passes(preset)
    ]
    ideal = split_scores(found[1])
    for row in found:
        row.pop("method", None)
        row["gap"] = average_gap(split_scores(row), ideal)
    return found


def fit_rows(preset: Preset, name: str, root: Path, seed: int) -> list[Row]:
    """Fine-tuning from originals that were trained for fewer epochs: what fitting the images has to do with it."""
    found: list[Row] = []
    for epochs in preset.task(name).fits:
        task = replace(preset.task(name), epochs=epochs)
        draws = {forgotten: draw(task, root, forgotten, seed) for forgotten in preset.classes}
        data = Data(draws[preset.classes[0]].task, task.batch_size)  # the training images do not depend on the class
        original, _ = trained(task, data, seed, preset.accelerator)
        for forgotten, drawn in draws.items():
            before = scores(original, drawn.parts, preset.attack_samples)
            method = FineTune(max_steps=preset.steps)
            after = forgotten_by(method, original, drawn, preset, task.batch_size, seed)
            here = {"group": "fit", "value": epochs, "forgotten": forgotten}
            found += [{**here, "model": "original", **before}, {**here, "model": "fine-tuning", **after}]
    return found


def split_scores(row: Row) -> SplitScores:
    """A row as the package's average gap takes it; UA is an error there, which makes no difference to a gap."""
    return SplitScores(1 - row["ua"], row["ra"], row["ta"], row["mia"])
