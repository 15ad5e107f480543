"""Models that are planned for and not trained here: built on the meta device, where they take no memory.

lightning-unlearn plan-recording examples.benchmarks.large_models:decoder --batch-size 512 --steps 5000 ...
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Block", "LowRankLinear", "decoder", "decoder_with_lora"]


class LowRankLinear(nn.Module):
    """A frozen linear layer and a change of low rank."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)


class Block(nn.Module):
    """The weights of one block of a decoder with a gated feed-forward part; `rank` adapts its seven matrices."""

    def __init__(self, width: int, hidden: int, rank: int | None) -> None:
        super().__init__()
        for name in ("query", "key", "value", "out"):
            self.add_module(name, self._linear(width, width, rank))
        for name in ("gate", "up"):
            self.add_module(name, self._linear(width, hidden, rank))
        self.down = self._linear(hidden, width, rank)
        self.norms = nn.ParameterList(torch.ones(width) for _ in range(2))

    @staticmethod
    def _linear(inputs: int, outputs: int, rank: int | None) -> nn.Module:
        if rank is None:
            return nn.Linear(inputs, outputs, bias=False)
        return LowRankLinear(inputs, outputs, rank)


def decoder(
    width: int = 4096, depth: int = 32, hidden: int = 11008, vocabulary: int = 32_000, dtype: str = "float32"
) -> nn.Module:
    """The weights of a decoder of 6.7 billion parameters in 291 tensors, as of the models called 7B; no `forward`."""
    return _decoder(width, depth, hidden, vocabulary, None).to(getattr(torch, dtype))


def decoder_with_lora(
    rank: int = 16, width: int = 4096, depth: int = 32, hidden: int = 11008, vocabulary: int = 32_000
) -> nn.Module:
    """The same in bfloat16 and frozen, with float32 adapters of low rank on every matrix of its blocks."""
    model = _decoder(width, depth, hidden, vocabulary, rank)
    for name, parameter in model.named_parameters():
        adapts = ".down.weight" in name.replace("blocks", "", 1) and parameter.shape[0] == rank
        adapts = adapts or (".up.weight" in name and parameter.shape[-1] == rank)
        parameter.requires_grad_(adapts)
        if not adapts:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _decoder(width: int, depth: int, hidden: int, vocabulary: int, rank: int | None) -> nn.Module:
    model = nn.Module()
    model.embedding = nn.Embedding(vocabulary, width)
    model.blocks = nn.ModuleList(Block(width, hidden, rank) for _ in range(depth))
    model.norm = nn.ParameterList([torch.ones(width)])
    model.head = nn.Linear(width, vocabulary, bias=False)
    return model
