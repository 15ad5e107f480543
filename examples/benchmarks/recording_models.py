"""The models and the data that recording is measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["WORKLOADS", "Workload", "batches"]

POOL = 8
VOCABULARY, LENGTH = 8_000, 64


class SmallCNN(nn.Module):
    """0.55 million weights in 8 tensors, for images of 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, 10)."""
        logits: Tensor = self.head(self.features(x))
        return logits


class Transformer(nn.Module):
    """27 million weights: 6 layers of width 512, and a vocabulary of 8,000 going in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 512)
        layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(512, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch * length, vocabulary)."""
        logits: Tensor = self.head(self.encoder(self.embedding(x))).flatten(0, 1)
        return logits


def cifar_resnet18() -> nn.Module:
    """ResNet-18 for small images: a 3 x 3 convolution of stride 1 to begin with, and no pooling behind it."""
    import torchvision

    model: nn.Module = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def resnet50() -> nn.Module:
    """ResNet-50 for ImageNet."""
    import torchvision

    model: nn.Module = torchvision.models.resnet50()
    return model


def vit_b_16() -> nn.Module:
    """ViT-B/16 for ImageNet."""
    import torchvision

    model: nn.Module = torchvision.models.vit_b_16()
    return model


@dataclass(frozen=True)
class Workload:
    """A model, its optimizer, its batch, and how many steps make a block by default."""

    model: Callable[[], nn.Module]
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    shape: tuple[int, ...]
    classes: int
    steps: int


def _sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def _adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


WORKLOADS = {
    "resnet18": Workload(cifar_resnet18, _sgd, (64, 3, 32, 32), 10, 2),
    "cnn": Workload(SmallCNN, _sgd, (64, 3, 32, 32), 10, 30),
    "transformer": Workload(Transformer, _adamw, (8, LENGTH), VOCABULARY, 3),
    "resnet50": Workload(resnet50, _sgd, (128, 3, 224, 224), 1000, 20),
    "vit_b_16": Workload(vit_b_16, _adamw, (128, 3, 224, 224), 1000, 20),
}


def batches(workload: Workload, device: torch.device, data_root: str | None) -> list[tuple[Tensor, Tensor]]:
    """A few batches, already on the device: real CIFAR-10 where it is given and fits, else classes with a pattern.

    Synthetic images are a pattern of their class in noise; texts are to be copied. Both can be learned, so that the
    deltas are those of a training and not of a random walk.
    """
    generator = torch.Generator().manual_seed(0)
    shape, classes = workload.shape, workload.classes
    if len(shape) == 2:
        texts = [torch.randint(0, classes, shape, generator=generator).to(device) for _ in range(POOL)]
        return [(text, text.flatten()) for text in texts]
    if data_root is not None and shape[1:] == (3, 32, 32):
        import torchvision

        data = torchvision.datasets.CIFAR10(Path(data_root), train=True, download=False)
        images = torch.from_numpy(data.data[: POOL * shape[0]]).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        x = images.contiguous().to(device).split(shape[0])
        y = torch.tensor(data.targets[: POOL * shape[0]]).to(device).split(shape[0])
        return list(zip(x, y, strict=True))
    targets = [torch.randint(0, classes, shape[:1], generator=generator) for _ in range(POOL)]
    patterns = torch.randn(classes, shape[1], 4, 4, generator=generator)

    def images_of(target: Tensor) -> Tensor:
        coarse = nn.functional.interpolate(patterns[target], shape[2:])
        return (coarse + torch.randn(shape, generator=generator)).to(device)

    return [(images_of(target), target.to(device)) for target in targets]
