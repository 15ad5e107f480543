"""CF-k: fine-tune the last layers on the data to keep, with everything before them frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, cast

from lightning import LightningModule
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import Parameter

from lightning_unlearn.methods.base import hyperparameters
from lightning_unlearn.methods.fine_tune import FineTune
from lightning_unlearn.methods.loss_method import UnlearningHost
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import IntRange, SearchSpace
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.checks import check_choice, check_positive_int
from lightning_unlearn.utilities.layers import chosen_layers, frozen_statistics_layers

__all__ = ["CatastrophicForgettingK", "FrozenStatistics"]

FrozenStatistics: TypeAlias = Literal["keep", "update"]


@register
@hyperparameters
class CatastrophicForgettingK(FineTune):
    r"""CF-k: run the user's own `training_step` on the data to keep and update the last k layers alone.

    Rule: minimise the user's training loss over the retain data in the parameters of the last k layers.

    Guarantee: heuristic. It counts on catastrophic forgetting of what is no longer trained on; what the frozen layers
    have learnt from the forgotten data stays in them.

    Cost: less than `FineTune`: frozen layers take no gradients, and the backward pass ends at the first layer that is
    trained. With several processes or manual optimization, which may count on every gradient, they are computed and
    dropped.

    Fails: as `FineTune`, and more so, because fewer weights can move. Layers under reentrant activation checkpointing
    get no gradient behind frozen ones, as torch then warns.

    Differs from code in use: a layer is a submodule that holds trainable parameters itself, so a normalisation layer is
    one as well; the official experiments count blocks of a network (the SCRUB authors' code trains the last block of a
    ResNet and leaves its classifier frozen), which `layers` can name. Frozen normalisation layers keep their running
    statistics, which code that only switches `requires_grad` off goes on updating. Frozen weights stay bit for bit,
    also under weight decay, and do not count when gradients are clipped.

    Args:
        k: Layers to train, counted from the last registered. 1, the classifier of most networks (ours).
        layers: Patterns of layer names to train instead, such as `["net.layer4"]` for a block.
        frozen_statistics: `"keep"` has frozen normalisation layers normalise with their running statistics and learn
            nothing; `"update"` leaves them as in training.
        max_steps: Optimizer steps; 50 unless `max_epochs` is given (ours: the paper's comparisons have 10 epochs).
        max_epochs: Passes over the retain data instead.
        optimizer: Builds the optimizer; default the user's own, fresh, without schedulers.
        lr_scale: Factor on the user's learning rates; a third, as for `FineTune`.

    Raises:
        ValueError: at fit start, fewer than k layers, or a pattern that matches none.

    Source: Goel et al. 2022, arXiv 2201.06640.

    >>> CatastrophicForgettingK(k=2).k
    2
    """

    source: ClassVar[str] = "Goel et al. 2022, arXiv 2201.06640"
    search_space: ClassVar[SearchSpace] = {
        **FineTune.search_space,
        "k": IntRange(1, 3),
    }

    k: int = 1
    layers: Sequence[str] | None = None
    frozen_statistics: FrozenStatistics = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.k = check_positive_int("k", self.k)
        self.layers = None if self.layers is None else tuple(self.layers)
        self.frozen_statistics = check_choice("frozen_statistics", self.frozen_statistics, ("keep", "update"))
        self._frozen: list[Parameter] = []
        self._switched_off: list[Parameter] = []
        self._still: list[nn.Module] = []

    def prepare(self, host: UnlearningHost) -> None:
        """Find out what is frozen."""
        super().prepare(host)
        module = cast(LightningModule, host)
        chosen = chosen_layers(module, self.k, self.layers)
        trained = {parameter for layer in chosen.values() for parameter in layer.parameters(recurse=False)}
        self._frozen = [parameter for parameter in module.parameters() if parameter not in trained]
        self._still = frozen_statistics_layers(module, chosen) if self.frozen_statistics == "keep" else []
        if module.automatic_optimization and not (dist.is_available() and dist.is_initialized()):
            self._switched_off = [parameter for parameter in self._frozen if parameter.requires_grad]
            for parameter in self._switched_off:
                parameter.requires_grad_(False)

    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Any:
        """The user's step on the retain part, with frozen normalisation layers in eval mode."""
        modes = [(layer, layer.training) for layer in self._still]
        for layer in self._still:
            layer.training = False
        try:
            return super().step(host, batch, batch_idx)
        finally:
            for layer, training in modes:
                layer.training = training

    def update_masks(self, host: UnlearningHost, iteration: int) -> Mapping[Parameter, Tensor]:
        """Drop the gradients of what is frozen: no optimizer moves a parameter without one, no clipping counts it."""
        for parameter in self._frozen:
            parameter.grad = None
        return super().update_masks(host, iteration)

    def finish(self, host: UnlearningHost) -> None:
        """Let go of the layers, as trainable as they were."""
        super().finish(host)
        for parameter in self._switched_off:
            parameter.requires_grad_(True)
        self._frozen, self._switched_off, self._still = [], [], []
