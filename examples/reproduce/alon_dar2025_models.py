"""Networks of `alon_dar2025.py`, which differ in width alone, and the LightningModule that trains them."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Classifier", "build"]


def small_cnn(channels: int, width: int, classes: int) -> nn.Module:
    """Three strided convolutions with k, 2k and 4k channels, BatchNorm, and one linear layer."""
    layers: list[nn.Module] = []
    for outputs, kernel, stride, padding in ((width, 4, 4, 0), (2 * width, 3, 2, 1), (4 * width, 3, 2, 1)):
        convolution = nn.Conv2d(channels, outputs, kernel, stride, padding, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class PreActivationBlock(nn.Module):
    """Normalisation and activation before each of two convolutions, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features at the block's stride."""
        active = functional.relu(self.first_norm(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        features: Tensor = self.second(functional.relu(self.second_norm(self.first(active)))) + kept
        return features


def pre_activation_resnet18(channels: int, width: int, classes: int) -> nn.Module:
    """The family of ResNet-18 with k, 2k, 4k and 8k channels of Nakkiran et al. 2020; k = 64 is the usual network."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False)]
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        for stride in (1 if stage == 0 else 2, 1):
            layers.append(PreActivationBlock(inputs, outputs, stride))
            inputs = outputs
    head = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers, *head)


def build(family: str, channels: int, width: int, classes: int = 10) -> nn.Module:
    """The untrained network of a family at a width."""
    match family:
        case "small-cnn":
            return small_cnn(channels, width, classes)
        case "resnet-18":
            return pre_activation_resnet18(channels, width, classes)
        case other:
            raise ValueError(f"Expected `family` to be known, but got {other!r}.")


class Classifier(LightningModule):
    """Cross-entropy, SGD with momentum, and a one-cycle schedule, which forgetting passes do without."""

    def __init__(self, network: nn.Module, lr: float, steps: int) -> None:
        super().__init__()
        self.network, self.lr, self.steps = network, lr, steps

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        return functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        """No weight decay: width alone decides what can be fitted."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=self.steps + 1, pct_start=0.2, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
