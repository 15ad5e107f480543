"""CIFAR-10, MNIST and Fashion-MNIST for the studies, from a folder laid out as torchvision does."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

__all__ = ["CLASS_NAMES", "ImageName", "Images", "check_images", "load_images", "normalised"]

ImageName = Literal["CIFAR-10", "MNIST", "Fashion-MNIST"]

_FOLDERS = {"CIFAR-10": "cifar-10-batches-py", "MNIST": "MNIST/raw", "Fashion-MNIST": "FashionMNIST/raw"}
_SETS = {"CIFAR-10": CIFAR10, "MNIST": MNIST, "Fashion-MNIST": FashionMNIST}
_STATISTICS = {
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "MNIST": ((0.1307,), (0.3081,)),
    "Fashion-MNIST": ((0.2860,), (0.3530,)),
}
CLASS_NAMES: dict[ImageName, tuple[str, ...]] = {
    "CIFAR-10": (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ),
    "MNIST": tuple("0123456789"),
    "Fashion-MNIST": (
        "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
}  # fmt: skip


class Images(NamedTuple):
    """A data set.

    Attributes:
        train: uint8 (N, channels, height, width).
        train_labels: int64 (N,).
        test: uint8, as `train`.
        test_labels: int64.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def check_images(root: Path, names: Iterable[ImageName], download: bool = False) -> None:
    """Say what is missing before anything is trained; fetch it if asked to.

    Raises:
        SystemExit: a folder is not there.
    """
    for name in dict.fromkeys(names):
        if download:
            _SETS[name](str(root), download=True)
        if not (root / _FOLDERS[name]).is_dir():
            raise SystemExit(f"Expected {root} to hold {_FOLDERS[name]}. Use --download, or unpack {name} there.")


@cache
def load_images(root: Path, name: ImageName) -> Images:
    """The whole data set, kept in memory."""
    folder = root / _FOLDERS[name]
    if name == "CIFAR-10":
        train = _batches(folder, *(f"data_batch_{number}" for number in range(1, 6)))
        return Images(*train, *_batches(folder, "test_batch"))
    train, labels, test, test_labels = (
        _idx(folder / f"{part}-{kind}-ubyte") for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    )
    return Images(train[:, None], labels.long(), test[:, None], test_labels.long())


def _batches(folder: Path, *names: str) -> tuple[Tensor, Tensor]:
    # The authors' own files, from a folder the user named.
    found = [pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in names]  # noqa: S301
    pixels = np.concatenate([one["data"] for one in found]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(pixels), torch.tensor([label for one in found for label in one["labels"]])


def _idx(path: Path) -> Tensor:
    """A file of the MNIST family, plain or gzipped."""
    raw = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, -1, 4 + 4 * len(shape)).reshape(shape).copy())


def normalised(pixels: Tensor, name: ImageName) -> Tensor:
    """float32 with the customary mean and deviation of each channel."""
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1) for values in _STATISTICS[name])
    return (pixels.float() / 255 - mean) / deviation
