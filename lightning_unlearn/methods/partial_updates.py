"""Layer-wise partial updates: every optimizer step of a pass changes only a share of each layer's entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.functional.pruning import keep_of, kept_count, largest_entries, random_entries
from lightning_unlearn.utilities.checks import check_choice, check_fraction, check_positive_int, expected
from lightning_unlearn.utilities.whole_weights import is_piece

__all__ = ["MaskPolicy", "PartialUpdates"]

MaskPolicy: TypeAlias = Literal["magnitude", "random", "cyclic", "fixed"]


@dataclass(frozen=True, slots=True)
class PartialUpdates:
    """Which entries of each layer an optimizer step may change: exactly `ceil(fraction * numel)` of them.

    The idea, partial updates layer by layer while unlearning, is the paper's; its choice of entries and its fractions
    were not at hand, so every policy here is a reconstruction (inferred) and a parameter.

    Masks hold for the *update*: what momentum, Adam's state or weight decay would do to other entries is taken back,
    bit for bit. With `fraction=1` nothing is masked and a pass is the naive one, bit for bit.

    Attributes:
        fraction: Share of each layer, in (0, 1].
        mask: `"magnitude"`: the entries with the largest gradient in this step. `"random"`: drawn anew for every step.
            `"cyclic"`: blocks that take turns, so that every entry comes once in `1 / fraction` steps. `"fixed"`: drawn
            once for the pass.
        overrides: Pattern of parameter names -> fraction, the first that matches.
        seed: For `"random"` and `"fixed"`; the same masks on every process.

    Raises:
        ValueError: a fraction out of range, or an unknown policy.

    Source: Gogineni & Nadimi 2024, arXiv 2403.07611 (algorithms 2 and 3; details inferred).

    >>> weight = Parameter(torch.zeros(4)); weight.grad = torch.tensor([1.0, -3.0, 0.0, 2.0])
    >>> PartialUpdates(0.5).masks([("w", weight)], 0)[weight].tolist()
    [False, True, False, True]
    """

    fraction: float = 0.1
    mask: MaskPolicy = "magnitude"
    overrides: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("fraction", self.fraction)
        check_choice("mask", self.mask, ("magnitude", "random", "cyclic", "fixed"))
        check_positive_int("seed", self.seed, zero=True)
        for pattern, fraction in self.overrides.items():
            check_fraction(f"overrides[{pattern!r}]", fraction)

    def masks(self, parameters: Iterable[tuple[str, Parameter]], iteration: int) -> dict[Parameter, Tensor]:
        """Bool masks of the entries that may change, by parameter; parameters that are not restricted are left out.

        Args:
            parameters: Names and parameters, in the same order at every call; those without a gradient are left out.
            iteration: Number of the step, from 0.

        Raises:
            UnsupportedStrategyError: a parameter is sharded, so that no process sees a whole layer.
        """
        found = {}
        for layer, (name, parameter) in enumerate(parameters):
            count = kept_count(parameter.numel(), keep_of(name, self.fraction, self.overrides))
            if parameter.grad is None or count == parameter.numel():
                continue
            if is_piece(parameter):
                rule, remedy = "whole on every process for partial updates", "Use DDP or one device."
                raise UnsupportedStrategyError(expected(name, rule, "a sharded parameter", remedy))
            mask = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
            mask[self._positions(parameter, count, layer, iteration).to(parameter.device)] = True
            found[parameter] = mask.view(parameter.shape)
        return found

    def _positions(self, parameter: Parameter, count: int, layer: int, iteration: int) -> Tensor:
        n = parameter.numel()
        if self.mask == "cyclic":
            return (torch.arange(count) + iteration * count % n) % n
        if self.mask == "magnitude" and parameter.grad is not None:
            # A step with gradients that overflowed is skipped by its scaler, whatever the mask.
            return largest_entries(parameter.grad.detach().float().nan_to_num().reshape(-1), count)
        return random_entries(n, count, (self.seed, iteration if self.mask == "random" else 0, layer))
