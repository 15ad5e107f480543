"""Models, optimizers and data on which predictions of the cost of recording are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import TensorDataset

__all__ = ["CHECKED", "OPTIMIZERS", "images"]

WORDS, LENGTH = 2_000, 32


def mlp() -> nn.Module:
    """1.9 million weights in 6 tensors."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


class VisionTransformer(nn.Module):
    """2.7 million weights in 80 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 192, 7, 7)
        self.places = nn.Parameter(torch.zeros(1, 16, 192))
        layer = nn.TransformerEncoderLayer(192, 6, 768, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, 10)."""
        logits: Tensor = self.head(self.blocks(self.patches(x).flatten(2).mT + self.places).mean(1))
        return logits


class Mobile(nn.Module):
    """1.5 million weights in 142 tensors, most of them small."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.mobilenet_v3_small(num_classes=10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, 10)."""
        logits: Tensor = self.net(x.expand(-1, 3, -1, -1))
        return logits


class Recurrent(nn.Module):
    """1.4 million weights in 11 tensors, a fifth of them an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 128)
        self.lstm = nn.LSTM(128, 256, 2, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, 10)."""
        logits: Tensor = self.head(self.lstm(self.embedding(x))[0].mean(1))
        return logits


class LowRank(nn.Module):
    """A linear layer that is frozen, and a change of rank 8 that is not."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 8, bias=False)
        self.up = nn.Linear(8, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's answer and the change."""
        changed: Tensor = self.base(x) + self.up(self.down(x))
        return changed


def adapters() -> nn.Module:
    """Adapters on the multilayer perceptron: 2 % of its weights."""
    return nn.Sequential(*(LowRank(part) if isinstance(part, nn.Linear) else part for part in mlp()))


CHECKED: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "vit": VisionTransformer,
    "mobilenet": Mobile,
    "lstm": Recurrent,
    "adapters": adapters,
}

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-4),
}


def images(model: str, samples: int, data_root: str | None) -> TensorDataset:
    """Fashion-MNIST where it is given, else classes with a pattern in noise; texts for the recurrent network."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 10, (samples,), generator=generator)
    if model == "lstm":
        texts = torch.randint(0, WORDS, (samples, LENGTH), generator=generator)
        texts[:, ::4] = targets[:, None] * 7 + 3  # words that say what class it is
        return TensorDataset(texts, targets)
    if data_root is not None:
        data = torchvision.datasets.FashionMNIST(data_root, train=True, download=False)
        return TensorDataset(data.data[:samples, None].float().div(127.5).sub(1), data.targets[:samples])
    patterns = torch.randn(10, 1, 28, 28, generator=generator)
    return TensorDataset(patterns[targets] + torch.randn(samples, 1, 28, 28, generator=generator), targets)
