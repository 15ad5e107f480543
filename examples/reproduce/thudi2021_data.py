"""CIFAR-10 and IMDB for `thudi2021.py`, from a folder that holds them."""

from __future__ import annotations

import csv
import io
import lzma
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import check_images, load_images, normalised
from lightning import LightningDataModule
from thudi2021_settings import Task
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Parts", "TuneData", "check_data", "draw"]


def check_data(root: Path, tasks: tuple[Task, ...], download: bool) -> None:
    """Say what is missing before anything is trained; fetch what can be fetched.

    Raises:
        SystemExit: a folder is not there.
    """
    needed = {task.dataset for task in tasks}
    if "cifar10" in needed:
        check_images(root, ["CIFAR-10"], download)
    if "imdb" in needed and not any((root / name).is_dir() for name in ("IMDB", "aclImdb")):
        raise SystemExit(
            f"Expected {root} to hold aclImdb (the original folder of the Large Movie Review Dataset) or IMDB with "
            "train.csv.xz and test.csv.xz (columns label, id, rating, text)."
        )


def _reviews(root: Path, part: str) -> Iterator[tuple[int, str]]:
    """Label and text of every review, from the original folders or from one compressed CSV."""
    folder = root / "aclImdb" / part
    if folder.is_dir():
        for label, kind in enumerate(("neg", "pos")):
            for path in sorted((folder / kind).glob("*.txt")):
                yield label, path.read_text(encoding="utf-8")
        return
    with lzma.open(root / "IMDB" / f"{part}.csv.xz") as packed:
        for row in csv.DictReader(io.TextIOWrapper(packed, encoding="utf-8", newline="")):
            yield int(row["label"]), row["text"]


@cache
def _tokenised(root: Path, part: str, length: int) -> tuple[list[list[str]], Tensor]:
    labels, texts = [], []
    for label, text in _reviews(root, part):
        labels.append(label)
        texts.append(re.findall(r"[a-z']+", text.lower().replace("<br />", " "))[:length])
    return texts, torch.tensor(labels)


def _encoded(texts: list[list[str]], numbers: dict[str, int], length: int) -> Tensor:
    """Tokens (N, length): 0 behind the end, 1 for a word outside the vocabulary."""
    rows = np.zeros((len(texts), length), dtype=np.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = [numbers.get(word, 1) for word in text]
    return torch.from_numpy(rows)


@dataclass(frozen=True)
class Parts:
    """What one seed draws.

    Attributes:
        pretrain: Samples to pretrain on.
        tune: Samples to fine-tune on.
        test: Held-out samples.
        shadow: As many as to fine-tune on, for the shadow model of the privacy risk score; empty without a table of
            costs.
    """

    pretrain: TensorDataset
    tune: TensorDataset
    test: TensorDataset
    shadow: TensorDataset


def draw(task: Task, root: Path, seed: int) -> Parts:
    """The samples of a seed; no sample is in two parts. Repeated reviews of IMDB are left as they are.

    Raises:
        ValueError: the data are too few.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = (task.pretrain[0], task.tune_samples, task.tune_samples if task.shards else 0)

    def chosen(available: int, *wanted: int) -> list[list[int]]:
        if sum(wanted) > available:
            raise ValueError(f"Expected at least {sum(wanted):,} samples of {task.dataset}, but got {available:,}.")
        order = torch.randperm(available, generator=generator).tolist()
        ends = np.cumsum([0, *wanted]).tolist()
        return [order[start:end] for start, end in pairwise(ends)]

    if task.dataset == "cifar10":
        pixels, labels, test_pixels, test_labels = load_images(root, "CIFAR-10")
        rows, (held,) = chosen(len(labels), *counts), chosen(len(test_labels), task.test_samples)
        inputs = [normalised(pixels[part], "CIFAR-10") for part in rows]
        inputs.append(normalised(test_pixels[held], "CIFAR-10"))
    else:
        texts, labels = _tokenised(root, "train", task.length)
        test_texts, test_labels = _tokenised(root, "test", task.length)
        rows, (held,) = chosen(len(labels), *counts), chosen(len(test_labels), task.test_samples)
        words = Counter(word for row in rows[0] for word in texts[row])
        numbers = {word: place for place, (word, _) in enumerate(words.most_common(task.vocabulary - 2), start=2)}
        inputs = [_encoded([texts[row] for row in part], numbers, task.length) for part in rows]
        inputs.append(_encoded([test_texts[row] for row in held], numbers, task.length))
    pretrain, tune, shadow = (TensorDataset(x, labels[part]) for x, part in zip(inputs[:3], rows, strict=True))
    return Parts(pretrain, tune, TensorDataset(inputs[3], test_labels[held]), shadow)


class TuneData(LightningDataModule):
    """The fine-tuning: the same batches in the same order in every epoch, so that one of them can be left out.

    Args:
        parts: What the seed drew.
        batch_size: Samples of a step.
    """

    def __init__(self, parts: Parts, batch_size: int) -> None:
        super().__init__()
        self.parts, self.batch_size = parts, batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """In the order of the rows."""
        return DataLoader(self.parts.tune, self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Held-out samples."""
        return DataLoader(self.parts.test, 500)
