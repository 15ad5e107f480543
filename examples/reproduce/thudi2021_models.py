"""Networks of `thudi2021.py`, and the LightningModule that trains them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning import LightningModule
from thudi2021_settings import Task
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18, vgg19_bn

from lightning_unlearn.functional.standard_deviation_penalty import standard_deviation_penalty

__all__ = ["Classifier", "build"]


Normalisation = Callable[[int], nn.Module]


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Normalisation) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm(outputs),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features at the block's stride."""
        features: Tensor = self.layers(x) + self.shortcut(x)
        return functional.relu(features)


def group_norm(channels: int) -> nn.Module:
    """Over four groups of channels: a sample's gradient depends on that sample alone, and nothing is carried along."""
    return nn.GroupNorm(4, channels)


def small_resnet(classes: int, norm: Normalisation, width: int = 16) -> nn.Module:
    """A residual network of eight layers with 78 k parameters, for 3x32x32 images, halved by its first convolution."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False), norm(width), nn.ReLU(),
        ResidualBlock(width, width, 1, norm), ResidualBlock(width, 2 * width, 2, norm),
        ResidualBlock(2 * width, 4 * width, 2, norm),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes),
    )  # fmt: skip


class MeanPooling(nn.Module):
    """A text's mean word vector through one hidden layer; token 0 is padding."""

    def __init__(self, vocabulary: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, classes) of tokens (N, length)."""
        known = (tokens > 0).unsqueeze(-1)
        total: Tensor = (self.words(tokens) * known).sum(1)
        logits: Tensor = self.head(total / known.sum(1).clamp(min=1))
        return logits


def _cifar_resnet18(classes: int) -> nn.Module:
    """ResNet-18 with the 3x3 stem for small images that the official code's CIFAR networks have."""
    network = resnet18(num_classes=classes)
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    return network


def _cifar_vgg19(classes: int) -> nn.Module:
    """VGG-19 with BatchNorm and one linear layer behind its convolutions."""
    return nn.Sequential(vgg19_bn().features, nn.Flatten(), nn.Linear(512, classes))


def build(task: Task) -> nn.Module:
    """The untrained network of a task."""
    match task.network:
        case "small-resnet":
            return small_resnet(task.classes, group_norm)
        case "small-resnet-bn":
            return small_resnet(task.classes, nn.BatchNorm2d)
        case "mean-pooling":
            return MeanPooling(task.vocabulary, task.classes)
        case "resnet-18":
            return _cifar_resnet18(task.classes)
        case "vgg-19":
            return _cifar_vgg19(task.classes)
        case other:
            raise ValueError(f"Expected `network` to be known, but got {other!r}.")


class Classifier(LightningModule):
    """Cross-entropy with the SD penalty, in the paper's form.

    The penalty is part of `training_step`, not a callback, so that the gradient of single-gradient unlearning and the
    Hessian of the unlearning error are those of the loss that is trained.
    """

    def __init__(
        self, network: nn.Module, lr: float, gamma: float = 0.0, optimizer: Literal["sgd", "adam"] = "sgd"
    ) -> None:
        super().__init__()
        self.network, self.lr, self.gamma, self.optimizer_name = network, lr, gamma, optimizer

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        logits = self(x)
        loss = functional.cross_entropy(logits, y)
        return loss + standard_deviation_penalty(logits, self.gamma) if self.gamma else loss

    def configure_optimizers(self) -> Any:
        """Plain SGD: no momentum, no weight decay, no schedule, as the update rule presumes; or Adam to pretrain."""
        if self.optimizer_name == "adam":
            return torch.optim.Adam(self.parameters(), lr=self.lr)
        return torch.optim.SGD(self.parameters(), lr=self.lr)
