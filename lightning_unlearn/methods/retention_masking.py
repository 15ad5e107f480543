"""Retention-based masking: set weights to zero that do not matter to the data to keep, then fine-tune on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_unlearn.exceptions import MissingRequirementError, UnsupportedStrategyError
from lightning_unlearn.functional.retention import kept_masks
from lightning_unlearn.methods.base import Requirement, hyperparameters
from lightning_unlearn.methods.fine_tune import FineTune
from lightning_unlearn.methods.loss_method import UnlearningHost
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import FloatRange, SearchSpace
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.checks import check_choice, check_fraction, expected
from lightning_unlearn.utilities.modes import isolated_rng
from lightning_unlearn.utilities.whole_weights import is_piece

__all__ = ["Importance", "MaskScope", "RetentionMasking"]

Importance: TypeAlias = Literal["absolute", "squared"]
MaskScope: TypeAlias = Literal["layer", "global"]


@register
@hyperparameters
class RetentionMasking(FineTune):
    r"""Set the weights to zero that matter least to the data to keep, then run the user's own step on that data.

    Rule: :math:`\hat\theta = m \odot \theta`, m = 1 where :math:`\sum_b |\nabla L(\theta; B_b)|` over the batches of
    the data to keep is among the largest `keep` share of a layer's entries, then fine-tune from :math:`\hat\theta`.

    Guarantee: heuristic. In the paper's linear model with separate features it gives the retrained model; fine-tuning
    alone does not, because nothing in it moves a weight that only the forgotten data needed.

    Cost: one pass over the data in eval mode for the mask, then as `FineTune`.

    With a store the pass is not recorded: setting weights to zero is no optimizer step.

    Fails: with a small `keep` the model is destroyed and fine-tuning is re-learning; at a perfectly fitted model all
    gradients of the data to keep are nearly zero and their order is noise.

    What is the paper's and what is ours: a mask built from the data to keep, applied to the trained weights before
    fine-tuning, is the paper's. Its formula was not at hand (inferred): accumulation, share, scope, what is masked and
    whether later updates respect the mask are parameters. Every process sees all the data for the mask.

    Args:
        keep: Share of the entries that keep their values. 0.7 (ours), as measured on digits: wrong labels are forgotten
            entirely for at most 0.5 points of test accuracy, 0.9 leaves a tenth of them, 0.5 costs up to 3 points.
        mask_of: `"retain"` keeps what matters most to the data to keep. `"forget"` is the paper's baseline: it sets to
            zero what matters most to the data to forget, which the data to keep may need as well.
        importance: `"absolute"` sums gradient magnitudes of the batches, `"squared"` their squares; a sum of signed
            gradients would vanish at a trained model.
        scope: One threshold in each layer, or one for all: `"global"` can empty a whole layer.
        vectors: Whether biases and normalisation scales are masked as well; only matrices and kernels are, because a
            scale of zero switches a unit off.
        restrict: Whether fine-tuning leaves what was set to zero at zero.
        max_steps: Optimizer steps; 50 unless `max_epochs` is given.
        max_epochs: Passes over the retain data instead.
        optimizer: Builds the optimizer; default the user's own, fresh, without schedulers.
        lr_scale: Factor on the user's learning rates; a third, as for `FineTune`.

    Raises:
        ValueError: a share out of range, or an unknown choice.

    Source: Ding et al., arXiv 2410.03833, versions 2 and 3; formula inferred.

    >>> RetentionMasking().mask_of
    'retain'
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.RETAIN_DATA, Requirement.FORGET_DATA})
    source: ClassVar[str] = "Ding et al. 2025, arXiv 2410.03833v3"
    combines_losses: ClassVar[bool] = True
    recordable: ClassVar[bool] = False
    search_space: ClassVar[SearchSpace] = {
        **FineTune.search_space,
        "keep": FloatRange(0.3, 0.95),
    }

    keep: float = 0.7
    mask_of: Part = "retain"
    importance: Importance = "absolute"
    scope: MaskScope = "layer"
    vectors: bool = False
    restrict: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.keep = check_fraction("keep", self.keep)
        self.mask_of = check_choice("mask_of", self.mask_of, ("retain", "forget"))
        self.importance = check_choice("importance", self.importance, ("absolute", "squared"))
        self.scope = check_choice("scope", self.scope, ("layer", "global"))
        self.vectors = bool(self.vectors)
        self.restrict = bool(self.restrict)
        self._masks: dict[Parameter, Tensor] = {}

    def prepare(self, host: UnlearningHost) -> None:
        """Build the mask and apply it.

        Raises:
            MissingRequirementError: the user's step skips every batch, or nothing is to be masked; no weight was
                changed.
            UnsupportedStrategyError: a parameter is sharded; no weight was changed.
        """
        super().prepare(host)
        masked = {name: one for name, one in host.named_parameters() if one.requires_grad and self._is_masked(one)}
        for name, one in masked.items():
            if is_piece(one):
                rule = f"whole on every process for {self.name}"
                raise UnsupportedStrategyError(expected(name, rule, "a sharded parameter", "Use DDP or one device."))
        if not masked:
            rule = "one with trainable matrices or kernels to mask"
            raise MissingRequirementError(expected("model", rule, "one without", "Use vectors=True."))
        with isolated_rng():  # a look at the data; what the pass draws afterwards is as without it
            scores = self._scores(host, list(masked.values()))
        found = kept_masks(
            scores, self.keep, of="largest" if self.mask_of == "retain" else "smallest", scope=self.scope
        )
        # Sums on a GPU may differ in their last bits from one process to the next.
        agreed = host.agreed([mask.cpu() for mask in found])
        self._masks = {one: mask.to(one.device) for one, mask in zip(masked.values(), agreed, strict=True)}
        with torch.no_grad():
            for parameter, mask in self._masks.items():
                parameter.mul_(mask)

    def update_masks(self, host: UnlearningHost, iteration: int) -> Mapping[Parameter, Tensor]:
        """What was set to zero stays so, if asked for."""
        masks = dict(super().update_masks(host, iteration))
        if self.restrict:
            for parameter, mask in self._masks.items():
                masks[parameter] = masks[parameter] & mask if parameter in masks else mask
        return masks

    def finish(self, host: UnlearningHost) -> None:
        """Let go of the masks."""
        super().finish(host)
        self._masks = {}

    def _is_masked(self, parameter: Parameter) -> bool:
        return self.vectors or parameter.ndim > 1

    def _scores(self, host: UnlearningHost, parameters: list[Parameter]) -> list[Tensor]:
        scores = [torch.zeros_like(one, dtype=torch.float32) for one in parameters]
        seen = 0
        with host.differentiable() as (loss_of, _):
            for batch in host.part_loader(self.mask_of):
                loss = loss_of(batch)
                if loss is None:
                    continue
                seen += 1
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for score, gradient in zip(scores, gradients, strict=True):
                    if gradient is not None:
                        size = gradient.detach().float().abs()
                        score += size if self.importance == "absolute" else size.square()
        if not seen:
            remedy = "Its loss on the data is what the mask is made of."
            raise MissingRequirementError(expected("training_step", "returning a loss in eval mode", None, remedy))
        return scores
