"""SalUn: training on wrong labels that changes only the weights that the data to forget bear on most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.functional.curvature import unflatten
from lightning_unlearn.functional.saliency import saliency_masks
from lightning_unlearn.methods.base import hyperparameters
from lightning_unlearn.methods.batch_gradients import batch_gradients, trainable_of
from lightning_unlearn.methods.loss_method import UnlearningHost, user_loss, weighted_sum
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.relabelling import Labels, Relabelling
from lightning_unlearn.methods.search_space import Choices, FloatRange, IntRange, SearchSpace
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.checks import check_fraction, check_positive, expected
from lightning_unlearn.utilities.whole_weights import is_piece

__all__ = ["SalUn"]


@register
@hyperparameters
class SalUn(Relabelling):
    r"""Train on random labels of the data to forget, with all but the salient weights frozen.

    Rule: :math:`\theta_u = \theta + m \odot \Delta\theta` with :math:`m = 1(|g| \ge \gamma)`, :math:`g` the *sum* over
    the forget batches of the gradients of their mean loss at the trained weights (signed: first the sum, then the
    magnitude), and one threshold :math:`\gamma` over all layers together. :math:`\Delta\theta` minimises
    :math:`E_f CE(x, y') + \alpha E_r CE(x, y)` with random labels :math:`y'`.

    Guarantee: heuristic. Exactly :math:`\lfloor density \cdot P \rfloor` of the P trainable weights may change; the
    others are what they were, bit for bit, whatever momentum, Adam's state or weight decay would do to them.

    Cost: one backward pass over the forget data for the mask, then two forward and backward passes a step.

    Fails: as `CEFineTune`; the mask keeps the harm to other data small and does not make the labels right. Running
    statistics of normalisation layers are no weights and follow the retain data.

    Differs from the official code: there each epoch passes over the forget data first and then over the retain data
    (CIFAR-10), or over both shuffled together; here every step has a batch of either. The current code zeroes masked
    gradients and momentum and resets the weights after the step; here the step's update is taken back, which is the
    same for the weights (but clipping by norm counts all gradients). Frozen parameters have no entry in P.

    Args:
        density: Share of all weights that may change, in (0, 1]. 0.5, the median, as in the paper; it searches 0.1 to
            0.9. 1 is `CEFineTune` with the same settings, bit for bit.
        retain_weight: The weight :math:`\alpha` of the retain term; 1, because the code trains on both alike.
        labels: `"any"` draws from all classes, so that the true one may come back, as the official code does; `"wrong"`
            never draws it.
        draw: See `CEFineTune`; anew for every batch as the code does for every epoch.
        seed: Seed of `draw="sample"`.
        n_classes: Number of classes; counted in the model's logits unless it is given.
        max_steps: Optimizer steps; 50 unless `max_epochs` is given (ours: the paper has 10 epochs).
        max_epochs: Passes over the longer part instead.
        optimizer: Builds the optimizer; default the user's own, fresh, without schedulers.
        lr_scale: Factor on the user's learning rates; a tenth, near the 0.013 of the authors' example for models
            trained with 0.1. A third cost a small CNN more.
        stop: See `PushingMethod`.
        check_every: Steps between two looks at the losses.
        forget_statistics: See `ForgetStatistics`.

    Source: Fan et al. 2024, arXiv 2310.12508; stopping rule ours.

    >>> SalUn().density, SalUn().labels
    (0.5, 'any')
    """

    source: ClassVar[str] = "Fan et al. 2024, arXiv 2310.12508"
    # Published (recalled): rates of 5e-4 to 5e-2 for models trained with 0.1, and sparsities of 0.1 to 0.9.
    search_space: ClassVar[SearchSpace] = {
        "lr_scale": FloatRange(0.005, 0.5, log=True),
        "max_steps": IntRange(10, 150, log=True),
        "density": FloatRange(0.1, 0.9),
        "retain_weight": FloatRange(0.1, 10, log=True),
        "stop": Choices(("held_out", "retain", None)),
    }

    retain_weight: float = 1.0
    density: float = 0.5
    labels: Labels = "any"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.retain_weight = check_positive("retain_weight", self.retain_weight, zero=True)
        self.density = check_fraction("density", self.density)
        self._masks: dict[Parameter, Tensor] = {}

    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Tensor | None:
        """The user's loss on the relabelled forget part, and that on the retain part with its weight."""
        retain = user_loss(host, "retain", batch, batch_idx)
        forget = self.relabelled_loss(host, batch, batch_idx)
        return weighted_sum((self.retain_weight, retain), (1.0, forget))

    def prepare(self, host: UnlearningHost) -> None:
        """Compute the mask from the forget data; where `density` is 1 there is none.

        Raises:
            UnsupportedStrategyError: a parameter is sharded, so that no process sees a whole layer.
            MissingRequirementError: no forget batch has a loss.
        """
        super().prepare(host)
        if self.density == 1.0:
            return
        parameters = trainable_of(host.named_parameters())
        for name, parameter in parameters.items():
            if is_piece(parameter):
                rule, remedy = "whole on every process for SalUn", "Use DDP or one device."
                raise UnsupportedStrategyError(expected(name, rule, "a sharded parameter", remedy))
        total = torch.zeros(())
        with host.differentiable() as (loss, _):
            for _, gradient in batch_gradients(loss, host.part_loader("forget"), parameters):
                total = total.to(gradient.device) + gradient
        # Every process has summed over all the data; the last bits may differ between unlike devices.
        total = host.agreed(total.cpu())
        masks = saliency_masks(unflatten(total, list(parameters.values())), self.density)
        self._masks = {
            parameter: mask.to(parameter.device) for parameter, mask in zip(parameters.values(), masks, strict=True)
        }

    def update_masks(self, host: UnlearningHost, iteration: int) -> Mapping[Parameter, Tensor]:
        """The salient entries, and of those what `with_updates` leaves."""
        masks = dict(super().update_masks(host, iteration))
        for parameter, mask in self._masks.items():
            masks[parameter] = mask & masks[parameter] if parameter in masks else mask
        return masks

    def finish(self, host: UnlearningHost) -> None:
        """Drop the mask."""
        super().finish(host)
        self._masks = {}
